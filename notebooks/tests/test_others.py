"""Models that others trained: what they are, what they read, how one is tuned."""

import hashlib
import json
import re
import subprocess
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from data import finetune, others
from data.others import WheelError, chemistry, masked, masked_scores, nats, wheel

ALBERT = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"


@pytest.fixture(scope="module")
def table():
    return others.reactions()


@pytest.fixture
def trained():
    return chemistry()


def batches_of(trained, texts, size=16, seed=0):
    sequences = [trained.vocabulary.encode(text) for text in texts]
    generator = torch.Generator().manual_seed(seed)
    return masked(sequences, trained.vocabulary.mask, size, generator)


# ---- the wheels ------------------------------------------------------------------------------


def test_a_wheel_is_fetched_by_hash_once_and_a_damaged_one_again(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as made:
        made.writestr("a.txt", "content")
    right, calls = (tmp_path / "made.whl").read_bytes(), []
    sha256 = hashlib.sha256(right).hexdigest()

    def pip(command, **options):
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert requirements == f"thing==1.0 --hash=sha256:{sha256}"
        assert {"--no-deps", "--require-hashes"} <= {*command}
        Path(command[-1], "thing-1.0-py3-none-any.whl").write_bytes(right)
        calls.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(others, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(others, "SHA256", {"thing==1.0": sha256})
    monkeypatch.setattr(subprocess, "run", pip)
    for _ in range(2):
        assert wheel("thing==1.0").read("a.txt") == b"content" and len(calls) == 1
    with zipfile.ZipFile(tmp_path / "wheels" / "thing==1.0.whl", "w") as another:
        another.writestr("a.txt", "of somebody else")
    assert wheel("thing==1.0").read("a.txt") == b"content" and len(calls) == 2


def test_without_a_network_it_says_what_to_do(tmp_path, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found\n")
    monkeypatch.setattr(others, "WHEELS", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(WheelError, match=r"No matching distribution .*\nCall again .* put the wh"):
        chemistry()


# ---- what is read ----------------------------------------------------------------------------


def test_the_tokens_are_those_of_the_authors(trained):
    vocabulary = trained.vocabulary
    tokens = vocabulary.split("C[C@H](Br)c1ccc2cc1#Cl>>[Na+].s")
    assert " ".join(tokens) == "C [C@H] ( Br ) c 1 c c c 2 c c 1 # Cl >> [Na+] . s"
    ids = vocabulary.ids
    assert vocabulary.encode("CO").tolist() == [ids["[CLS]"], ids["C"], ids["O"], ids["[SEP]"]]
    assert (vocabulary.first, vocabulary.last, vocabulary.mask) == (12, 13, 14)
    for text in ("C C", "CX", "[Xx]", "C->C"):
        with pytest.raises(ValueError, match="not made of the tokens"):
            vocabulary.split(text)


def elements(tokens):
    atoms = [token for token in tokens if token[0] == "[" or token.isalpha()]
    return [re.sub(r"[\[\]@+\-H\d]", "", atom).upper() for atom in atoms]


def test_the_reactions_are_different_ones_in_two_forms_of_the_same_atoms(trained, table):
    assert len(table) == table["reaction"].nunique() == 1280
    assert table["part"].value_counts().to_dict() == {"measured": 256, "tuning": 1024}
    for row in table.itertuples():
        forms = [trained.vocabulary.split(text) for text in (row.reaction, row.rewritten)]
        assert all(len(tokens) <= 70 and tokens.count(">>") == 1 for tokens in forms)
        assert Counter(elements(forms[0])) == Counter(elements(forms[1])), row.reaction


def test_an_atom_of_the_product_comes_from_one_of_its_element(trained, table):
    for _, row in table[table["part"] == "measured"][:12].iterrows():
        weights, origin = others.atom_maps(trained, row)
        sides = row["reaction"].split(">>")
        left, right = (elements(trained.vocabulary.split(side)) for side in sides)
        assert weights.shape == (12, 8, len(right), len(left)) and origin.shape == weights.shape[2:]
        assert origin.any(1).all() and weights.min() >= 0 and weights.sum(-1).max() <= 1 + 1e-5
        for p, r in origin.nonzero().tolist():
            assert right[p] == left[r], row["reaction"]


def test_masks_hide_the_same_share_of_every_sequence_and_never_its_ends():
    sequences = [torch.arange(100, 100 + n) for n in (7, 22, 22, 22, 42)]
    drawn = [masked(sequences, 5, 2, torch.Generator().manual_seed(seed)) for seed in range(20)]
    for batches in drawn:
        assert sorted(len(batch.ids) for batch in batches) == [1, 1, 1, 2]
        for ids, targets in batches:
            T, hidden = ids.shape[1], ids == 5
            assert (hidden == (targets != -100)).all() and not hidden[:, [0, -1]].any()
            assert (hidden.sum(1) == {7: 1, 22: 3, 42: 6}[T]).all()
            assert (torch.where(hidden, targets, ids) == torch.arange(100, 100 + T)).all()
    first, again = (str(masked(sequences, 5, 2, torch.Generator().manual_seed(0))) for _ in "ab")
    assert first == again != str(drawn[1])


# ---- the models ------------------------------------------------------------------------------


def test_it_names_hidden_tokens_and_head_10_5_finds_the_atoms(trained, table):
    some = table[table["part"] == "measured"][:48]
    assert masked_scores(trained.model, batches_of(trained, some["reaction"]))["accuracy"] > 0.93
    right = []
    for _, row in some[:24].iterrows():
        weights, origin = others.atom_maps(trained, row)
        found = weights.argmax(-1, keepdim=True)
        right.append(origin.expand(weights.shape).gather(-1, found)[..., 0])
    right = torch.cat(right, dim=-1).double().mean(-1)  # (L, H)
    assert right[10, 5] > 0.8 > 0.6 > right[10, [0, 1, 2, 3, 4, 6, 7]].max()


def test_every_logit_is_that_of_the_transformers_library(trained, table):
    transformers = pytest.importorskip("transformers")
    with wheel("rxnmapper==0.4.3") as files, files.open(f"{ALBERT}/pytorch_model.bin") as file:
        state = torch.load(file, "cpu", weights_only=True)
        config = transformers.AlbertConfig(**json.loads(files.read(f"{ALBERT}/config.json")))
    theirs = transformers.AlbertForMaskedLM(config).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not missing and all("pooler" in name for name in unexpected)
    ids = trained.vocabulary.encode(table["reaction"][0])[None]
    with torch.no_grad():
        torch.testing.assert_close(trained.model(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_scores_count_tokens_not_batches(trained):
    ids = torch.tensor([[12, 15, 16, 13]])
    one = others.Batch(ids, torch.tensor([[-100, 15, -100, -100]]))
    two = others.Batch(ids, torch.tensor([[-100, 15, 590, -100]]))
    parts = [masked_scores(trained.model, [batch]) for batch in (one, two)]
    both = masked_scores(trained.model, [one, two])
    for name in ("loss", "accuracy"):
        assert both[name] == pytest.approx((parts[0][name] + 2 * parts[1][name]) / 3, rel=1e-5)


# ---- fine-tuning -----------------------------------------------------------------------------


def test_full_is_plain_training_and_none_leaves_queries_and_keys_alone(table, monkeypatch):
    monkeypatch.setattr(finetune, "STEPS", 2)
    texts = [*table["rewritten"][:30]]
    start, models = chemistry().model.state_dict(), {}
    for rule in ("full", "diagonal", "none"):
        models[rule] = finetune.tuned(chemistry(), texts, rule, 1e-4, 7).state_dict()
    trained = chemistry()
    optimizer = torch.optim.Adam(trained.model.parameters(), 1e-4)
    for batch in batches_of(trained, texts, 4, 7)[:2]:
        optimizer.zero_grad()
        (nats(trained.model, batch) / (batch.targets != -100).sum()).backward()
        optimizer.step()
    # which weights moved
    held = {f"layers.0.attention.{n}.{p}" for n in ("query", "key") for p in ("weight", "bias")}
    for rule, model in models.items():
        moved = {name for name in start if not torch.equal(model[name], start[name])}
        assert moved == {*start} - (held if rule == "none" else set()), rule
    # and where to: Adam makes much of rounding where it divides by little
    query = "layers.0.attention.query.weight"
    plain = trained.model.state_dict()[query]
    step = (plain - start[query]).norm()
    assert (models["full"][query] - plain).norm() < 0.02 * step
    assert (models["diagonal"][query] - plain).norm() > 0.2 * step


def test_an_interrupted_table_of_runs_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "FINETUNING", tmp_path / "finetuning.csv")
    monkeypatch.setattr(finetune, "RATES", (1e-4, 1e-3))
    made, table = [], others.reactions()

    def scored(trained, measured):
        assert measured.equals(table[table["part"] == "measured"])
        return {"rewritten_loss": 1.0}

    monkeypatch.setattr(finetune, "scored", scored)

    def tuned(trained, texts, *run):
        assert texts == table.query("part == 'tuning'")["rewritten"].tolist()
        made.append(run)
        if len(made) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "tuned", tuned)
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune()
    assert len(pd.read_csv(finetune.FINETUNING)) == 1 + 5
    finetune.finetune()
    rows = pd.read_csv(finetune.FINETUNING)[["rule", "lr", "seed"]]
    assert len(rows) == 1 + 3 * 2 * 3 and not rows.duplicated().any()
    del made[5]  # the one that was interrupted
    assert made == [*rows[1:].itertuples(index=False, name=None)]


def test_the_first_of_the_stored_runs_comes_out_again(trained, table):
    rows = pd.read_csv(finetune.FINETUNING)
    assert not rows.duplicated(["rule", "lr", "seed"]).any()
    before = finetune.scored(trained, table[table["part"] == "measured"])
    assert {name: rows.loc[0, name] for name in before} == pytest.approx(before, abs=2e-3)
