"""The report's tables and figures for any language model of the transformers library, as one HTML file.

    python data/any_model.py --model gpt2 --text my.txt                     a name on the Hugging Face Hub
    python data/any_model.py --model path/to/model --text my.txt --out split.html

The model reads windows of the text, and its loss's gradient is caught at every head's attention weights: of the next
token, of masked tokens, or of a continuation, whatever the model was made for. It is then split into what each key can
know by itself and what it must be told about the others. From a folder nothing is looked up on the network, and code
that comes with a model is never run. Needs the extra: python -m pip install -e .[transformers]
"""

import argparse
import base64
import hashlib
import io
import pickle
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from helpers import DATA, DIVERGING, SEQUENTIAL, capture_attention, energy_table, save_atomically, set_style

try:
    import transformers
    from transformers.models.auto import modeling_auto as auto
except ImportError as error:
    sys.exit(f"any_model.py needs the transformers library ({error}): python -m pip install -e .[transformers]")

BATCH_SIZE = 4  # a model of a billion parameters then needs about 16 GB
MASKED_SHARE = 0.15  # as BERT was trained
MIN_LENGTH = 4  # tokens in a window: with fewer there is hardly a row to split

QUANTITIES = {
    "r_diag": "Energy of the diagonal part, which each key can compute from its own weight and its own error, over "
    "that of the exact gradient. Above 1 the part is longer than the whole.",
    "r_offdiag": "Energy of the off-diagonal (lateral) part, what a key must be told about the others, over the same.",
    "r_cross": "Twice the inner product of the two parts, over the same. Below 0 they cancel; the three add up to 1.",
    "cos_diag": "Cosine of the diagonal part with the exact gradient. At 1 the lateral part changes no direction.",
}


class Windows:
    """``rows`` (N, L): windows of a text, spread evenly over it, without the special tokens that go around each."""

    def __init__(self, text: str, tokenizer: transformers.PreTrainedTokenizerBase, length: int, sequences: int) -> None:
        if sequences < 2:
            raise ValueError(f"{sequences} windows make no interval: take two or more")
        self.mask = tokenizer.mask_token_id
        ids, marked = (tokenizer(text, add_special_tokens=s, verbose=False)["input_ids"] for s in (False, True))
        start = next(i for i in range(len(marked)) if marked[i : i + len(ids)] == ids) if ids else 0
        self.before, self.after = marked[:start], marked[start + len(ids) :]
        L = length - len(self.before) - len(self.after)
        n = len(ids) // L if L >= MIN_LENGTH else 0
        if n < 2:
            raise ValueError(
                f"{len(ids)} tokens of text make no two windows of {L}, special tokens not counted: take a longer text "
                f"or another --length, for at least {MIN_LENGTH} tokens"
            )
        chosen = torch.linspace(0, n - 1, min(n, sequences)).round().long()
        self.rows = torch.tensor(ids[: n * L]).view(n, L)[chosen]

    def marked(self, rows: Tensor) -> Tensor:
        """``rows`` with the special tokens around them."""
        before, after = (torch.tensor(ids, dtype=torch.long).expand(len(rows), -1) for ids in (self.before, self.after))
        return torch.cat([before, rows, after], dim=1)


# What a model is asked, by what it was made for: logits (B, T, V) and targets (B, T), -100 where nothing is asked.


def next_token(model: nn.Module, windows: Windows, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = windows.marked(rows).to(model.device)
    return model(input_ids=ids).logits[:, :-1], ids[:, 1:]


def masked_tokens(model: nn.Module, windows: Windows, rows: Tensor, generator: torch.Generator):
    if windows.mask is None:
        raise ValueError("the tokenizer has no mask token, which a masked language model needs")
    n_hidden = max(1, round(MASKED_SHARE * rows.shape[1]))  # as many in every window
    hidden = torch.rand(rows.shape, generator=generator).argsort(1) < n_hidden
    seen = windows.marked(rows.masked_fill(hidden, windows.mask))
    targets = torch.full_like(seen, -100)
    targets[:, len(windows.before) : seen.shape[1] - len(windows.after)] = rows.masked_fill(~hidden, -100)
    return model(input_ids=seen.to(model.device)).logits, targets.to(model.device)


def continuation(model: nn.Module, windows: Windows, rows: Tensor, generator: torch.Generator):
    first, second = (windows.marked(half).to(model.device) for half in rows.tensor_split(2, dim=1))
    return model(input_ids=first, labels=second).logits, second


OBJECTIVES = {  # in this order: BART is among the masked ones, too
    continuation: (transformers.AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    next_token: (transformers.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    masked_tokens: (transformers.AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
}


def load(name: str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, Callable]:
    """The model in float32 and without dropout, its tokenizer, and its objective."""
    here = Path(name).is_dir()
    if not here and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {name}: give one with a config.json, or a name on the Hub")
    options = {"local_files_only": here, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(name, **options)
    made_for = [ask for ask, (_, known) in OBJECTIVES.items() if {*(config.architectures or ())} & {*known.values()}]
    if not made_for:
        raise ValueError(f"{name} holds {config.architectures}: expected a causal, masked or seq2seq language model")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no tokenizer that can be read: {error}") from error
    n_tokens = len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    if n_tokens == 0:  # the library makes an empty one up where the files are missing
        raise ValueError(f"{name} has no tokenizer: save that of the model in the same folder")
    auto_class = OBJECTIVES[made_for[0]][0]
    model, info = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{name} lacks weights of {type(model).__name__} ({missing}): it would be partly random")
    if n_tokens > model.get_input_embeddings().num_embeddings:
        raise ValueError(f"{name} has a tokenizer of {n_tokens} tokens, more than its model knows: it is another one's")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, made_for[0]


def split(model: nn.Module, ask: Callable, windows: Windows) -> tuple[pd.DataFrame, float]:
    """``energy_table`` of all windows, with each layer's ``name``, and the mean loss in nats a predicted token."""
    generator = torch.Generator().manual_seed(0)
    total = n_targets = 0
    with capture_attention(model) as layers:
        for rows in tqdm(windows.rows.split(BATCH_SIZE), desc="windows, four at a time", leave=False):
            logits, targets = ask(model, windows, rows, generator)
            # a sum, so that a window counts the same whatever batch it is in; the split does not see the scale
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            if not loss.isfinite():
                raise ValueError(f"the loss of {type(model).__name__} on this text is {loss.item()}: nothing to split")
            loss.backward()
            model.zero_grad()
            total, n_targets = total + loss.item(), n_targets + (targets != -100).sum().item()
    table = energy_table(layers)
    table.insert(1, "name", table["layer"].map(dict(enumerate(layer.name for layer in layers))))
    return table, total / n_targets


def heatmap(table: pd.DataFrame, quantity: str) -> str:
    """Layers down and heads across, as the address of an SVG picture; 0 is white where a quantity has a sign."""
    grid = table.pivot(index="layer", columns="head", values=quantity)
    L, H = grid.shape
    style = {"cmap": DIVERGING, "center": 0} if grid.min(axis=None) < 0 else {"cmap": SEQUENTIAL}
    figure, ax = plt.subplots(figsize=(min(2 + 0.5 * H, 10), min(1 + 0.4 * L, 12)))
    sns.heatmap(grid, annot=H <= 16, fmt=".2f", annot_kws={"size": "small"}, linewidths=0.5, ax=ax, **style)
    ax.set_title(quantity)
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.getvalue()).decode()}"


def described(table: pd.DataFrame, quantity: str) -> str:
    """The alternative text of a heatmap: its size, its ends and where they are."""
    ends = [table.loc[table[quantity].agg(end)] for end in ("idxmin", "idxmax")]
    low, high = (f"{end[quantity]:.2f} (layer {end['layer']}, head {end['head']})" for end in ends)
    middle = f"half of the heads are below {table[quantity].median():.2f}"
    return f"{quantity} of {len(table)} heads in {table['layer'].nunique()} layers: from {low} to {high}; {middle}"


def readable(table: pd.DataFrame) -> str:
    """One row a head, with its intervals, as an HTML table."""
    columns = {"layer": table["layer"], "name": table["name"], "head": table["head"]}
    for quantity in (*QUANTITIES, "cos_ste", "entropy", "attn_max"):
        ends = zip(table[quantity], table[f"{quantity}_lo"], table[f"{quantity}_hi"], strict=True)
        columns[quantity] = [f"{v:.2f} [{lo:.2f}, {hi:.2f}]" if v == v else "not defined" for v, lo, hi in ends]
    return pd.DataFrame(columns).to_html(index=False, border=0)


def page(name: str, table: pd.DataFrame, facts: dict[str, object]) -> str:
    """The HTML file's text."""
    known = table.dropna(subset=list(QUANTITIES))
    if known.empty:
        raise ValueError("in no head is the gradient large enough to be told from rounding: nothing to show")
    set_style()
    environment = Environment(
        loader=FileSystemLoader(DATA), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("any_model.html.jinja").render(
        model=name,
        mean=known[list(QUANTITIES)].mean(),
        n_heads=len(table),
        n_defined=len(known),
        n_cancel=int((known["r_cross_hi"] < 0).sum()),
        quantities=QUANTITIES,
        pictures={quantity: heatmap(table, quantity) for quantity in QUANTITIES},
        alt={quantity: described(table, quantity) for quantity in QUANTITIES},
        csv=f"data:text/csv;base64,{base64.b64encode(table.to_csv(index=False).encode()).decode()}",
        table=readable(table),
        facts=facts,
    )


def report(model_name: str, text_file: Path, out: Path, length: int, sequences: int) -> None:
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_file} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"the text {text_file} cannot be read: {error.strerror}") from error
    model, tokenizer, ask = load(model_name)
    context = getattr(model.config, "max_position_embeddings", length)
    windows = Windows(text, tokenizer, min(length, context, tokenizer.model_max_length), sequences)
    table, loss = split(model, ask, windows)
    name = Path(model_name).name if Path(model_name).is_dir() else model_name
    facts = {
        "model": f"{name}, {type(model).__name__}, {model.num_parameters():,} parameters",
        "revision": getattr(model.config, "_commit_hash", None) or "a folder",
        "attention": f"{model.config._attn_implementation}, in float32, without dropout",
        "text": f"{text_file.name}, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}…",
        "windows": f"{len(windows.rows)} of {windows.rows.shape[1]} tokens, special tokens not counted",
        "loss": f"{loss:.3f} nats a token ({ask.__name__.replace('_', ' ')})",
        "made with": f"transformers {transformers.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}",
    }
    html = page(name, table, facts)
    save_atomically(out, lambda file: file.write(html.encode()))
    print(f"{out}: {len(table)} heads in {table['layer'].nunique()} layers, loss {facts['loss']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text")
    parser.add_argument("--out", type=Path, default=Path("any_model.html"), help="the HTML file (any_model.html)")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window, at most (128)")
    parser.add_argument("--sequences", type=int, default=32, help="windows, at most (32): they make the intervals")
    args = parser.parse_args()
    try:
        report(args.model, args.text, args.out, args.length, args.sequences)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        parser.exit(2, f"any_model.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "any_model.py: interrupted; nothing was written\n")


if __name__ == "__main__":
    main()
