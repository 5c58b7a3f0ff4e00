"""Make a character-level corpus in nanoGPT's layout: data/<name>/{train.bin, val.bin, meta.pkl}.

    python data/prepare.py                             Tiny Shakespeare, or the embedded corpus where it cannot be had
    python data/prepare.py shakespeare_char            Tiny Shakespeare, downloaded and verified (1.1 MB)
    python data/prepare.py python_reference            the embedded corpus: the English of Python's own reference
    python data/prepare.py --text FILE --name NAME     any UTF-8 text; NAME shakespeare_char takes a downloaded copy

One line on standard output names the corpus, its sizes and its SHA-256; everything else goes to standard error.
"""

import argparse
import hashlib
import os
import pickle
import re
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pooch

DATA = Path(__file__).resolve().parent
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
MIN_VALIDATION = 65  # tokens: one block of the report's models (64), and the target of its last token


class CorpusError(Exception):
    """What is wrong with a corpus, and what to do about it."""


# ---- text to tokens and back: pure --------------------------------------------------------------------------------


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
    return tokens.astype("<u2"), {"vocab_size": len(itos), "stoi": {c: i for i, c in itos.items()}, "itos": itos}


def decode(tokens, meta):
    """The text again.

    >>> decode(*encode("To be,\\r\\nor not"))
    'To be,\\r\\nor not'
    """
    codes = np.array([ord(meta["itos"][i]) for i in range(meta["vocab_size"])], "<u4")
    return codes[tokens].tobytes().decode("utf-32-le")


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


# ---- folders ------------------------------------------------------------------------------------------------------


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not plain data")


def read_text(folder):
    """The text of a prepared corpus, or None where the folder does not hold a whole one."""
    try:
        with open(folder / "meta.pkl", "rb") as file:
            meta = PlainUnpickler(file).load()
        parts = [np.fromfile(folder / name, "<u2") for name in ("train.bin", "val.bin")]
        tokens = np.concatenate(parts)
        return decode(tokens, meta) if len(parts[0]) == len(split(tokens)[0]) else None
    except Exception:  # what a damaged pickle raises can be anything
        return None


def write_corpus(name, text):
    """Write data/<name> whole or not at all; a folder that holds this very text already is left as it is."""
    folder = DATA / name
    tokens, meta = encode(text)
    train, val = split(tokens)
    if read_text(folder) != text:
        others = {path.name for path in folder.glob("*")} - {"train.bin", "val.bin", "meta.pkl"}
        if others:
            raise CorpusError(f"data/{name} holds {min(others)}, which is no part of a corpus: choose another --name")
        # Built beside its place, then swapped in by two renames: an interrupt leaves the old corpus or the new one.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=DATA) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            train.tofile(new / "train.bin")
            val.tofile(new / "val.bin")
            (new / "meta.pkl").write_bytes(pickle.dumps(meta))
            if os.path.lexists(folder):
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:
                if os.path.lexists(old):
                    old.rename(folder)
                raise
    print(
        f"data/{name}: {len(train):,} tokens to train on, {len(val):,} to validate on, "
        f"{meta['vocab_size']:,} distinct characters, SHA-256 {sha256(text)}"
    )


# ---- corpora ------------------------------------------------------------------------------------------------------


def read_file(path):
    try:
        # Bytes, not text mode: that would turn \r\n into \n.
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {error.start:,}): save it as UTF-8 first") from None
    except OSError as error:
        raise CorpusError(f"cannot read {path} ({error.strerror}): check what follows --text") from None


def download_shakespeare():
    with tempfile.TemporaryDirectory(prefix=".download-", dir=DATA) as scratch:
        try:
            pooch.get_logger().setLevel("WARNING")
            path = pooch.retrieve(
                SHAKESPEARE_URL,
                f"sha256:{SHAKESPEARE_SHA256}",
                fname="input.txt",
                path=scratch,
                downloader=pooch.HTTPDownloader(progressbar=True, timeout=10),
            )
        except (OSError, ValueError) as error:
            cause = re.search(r"Caused by (.*)\)$", str(error))
            raise CorpusError(
                f"Tiny Shakespeare could not be downloaded: {cause[1] if cause else error}\n"
                "    With a copy of it:     python data/prepare.py --text input.txt --name shakespeare_char\n"
                "    Without:               python data/prepare.py python_reference"
            ) from None
        return read_file(path)


def python_reference():
    return "\n\n".join(text for _, text in sorted(topics.items()))


def prepare_default():
    text = read_text(DATA / "shakespeare_char")
    if text is not None and sha256(text) == SHAKESPEARE_SHA256:
        return write_corpus("shakespeare_char", text)
    try:
        return write_corpus("shakespeare_char", download_shakespeare())
    except CorpusError as error:
        if os.path.lexists(DATA / "shakespeare_char"):
            raise CorpusError(f"data/shakespeare_char is damaged: delete it to go on without it.\n{error}") from None
        print(f"{error}\nGoing on with the EMBEDDED corpus, python_reference.", file=sys.stderr)
    write_corpus("python_reference", python_reference())


def prepare_text(path, name):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise CorpusError(f"{name!r} cannot name a corpus: use up to 64 letters, digits, _ and -, not - or _ first")
    if name == "python_reference":
        raise CorpusError("python_reference is the name of the embedded corpus: choose another --name")
    text = read_file(path)
    if name == "shakespeare_char" and sha256(text) != SHAKESPEARE_SHA256:
        raise CorpusError(f"{path} is not the Tiny Shakespeare that others use (SHA-256): choose another --name")
    write_corpus(name, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", choices=["shakespeare_char", "python_reference"])
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text of your own")
    parser.add_argument("--name", help="the folder under data/ to write it to")
    args = parser.parse_args()
    if (args.text is None) != (args.name is None) or (args.corpus and args.text is not None):
        parser.error("--text and --name go together, and without a corpus before them")
    try:
        if args.text is not None:
            prepare_text(args.text, args.name)
        elif args.corpus == "shakespeare_char":
            write_corpus("shakespeare_char", download_shakespeare())
        elif args.corpus == "python_reference":
            write_corpus("python_reference", python_reference())
        else:
            prepare_default()
    except (CorpusError, OSError) as error:
        parser.exit(2, f"prepare.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "prepare.py: interrupted, nothing was changed\n")


if __name__ == "__main__":
    main()
