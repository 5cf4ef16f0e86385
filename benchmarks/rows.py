"""Perplexity on rows of text: srcr's, a plain transformers loop's, and with BOS on the first row only.

    python benchmarks/rows.py MODEL TEXT.txt [--samples 16] [--seq-len 256]

The loop puts what the tokenizer adds before a text in front of every row; the stream is cut as it comes, so
that only its first row begins so.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from srcr.data.specs import EvaluationText
from srcr.models.load import load_model, load_tokenizer, resolve
from srcr.pipelines.evaluate import evaluate
from srcr.pipelines.options import RunOptions


def main() -> None:
    """Print the three perplexities."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()
    n, length, folder = args.samples, args.seq_len, resolve(args.model)
    tokenizer, model = load_tokenizer(folder), load_model(folder, torch.float32)
    assert tokenizer is not None, f"{args.model} has no tokenizer"
    text = args.text.read_text(encoding="utf-8")
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    prefix = whole[: len(whole) - len(plain)]
    step = length - len(prefix)
    rows = torch.tensor([[*prefix, *plain[i * step : (i + 1) * step]] for i in range(n)])
    stream = torch.tensor(whole[: n * length]).view(n, length)
    table = Table(
        "rows", "perplexity", title=f"{args.model}, {n} x {length} tokens of {args.text.name}"
    )
    source = EvaluationText(str(args.text), n, length)
    table.add_row("srcr evaluate", f"{measured(args.model, source):.4f}")
    table.add_row("plain loop", f"{perplexity(model, rows):.4f}")
    table.add_row("stream, BOS on the first row only", f"{perplexity(model, stream):.4f}")
    Console().print(table)


def measured(model: str, text: EvaluationText) -> float:
    """What ``srcr evaluate`` says of the base."""
    (result,) = evaluate(model, [model], text, options=RunOptions(quiet=True))
    assert result.divergence is not None
    return result.divergence.perplexity.base


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: Tensor) -> float:
    """By a loop over rows [n, len]."""
    losses = [
        cross_entropy(model(row[None], use_cache=False).logits[0, :-1], row[1:]) for row in ids
    ]
    return float(torch.stack(losses).mean().exp())


if __name__ == "__main__":
    main()
