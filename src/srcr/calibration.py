"""A source of text becomes a tensor of token ids [n, len].

Sources: ``bundled``, ``self`` (the model writes its own text), a ``.txt``, ``.jsonl`` (field ``text``) or
``.parquet`` (column ``text``) file, a ``.safetensors`` file with an int64 tensor ``input_ids`` [n, len],
or ``hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]``, a dataset of the Hugging Face hub (or a local folder).
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from srcr.errors import InputError, NumericalError, first_line
from srcr.models.load import context_length

Purpose = Literal["calibration", "evaluation"]
#: Sequences sampled from the model at a time.
SAMPLING_BATCH = 64


@dataclass(frozen=True, eq=False)
class Tokens:
    """``input_ids`` int64 [n, len], where they come from, and a hash of them."""

    input_ids: Tensor
    source: str
    sha256: str

    def record(self) -> dict[str, Any]:
        """What a run's record keeps of its data."""
        n, length = self.input_ids.shape
        return {
            "source": self.source,
            "samples": n,
            "seq_len": length,
            "sha256": self.sha256,
            "rows": self.rows(),
        }

    def rows(self) -> list[str]:
        """A short hash of each sequence, to tell whether two sets share any."""
        return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in self.input_ids]


def seed_stream(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that calibration and evaluation never share text."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def load_tokens(
    source: str,
    model: Any,
    tokenizer: Any | None,
    samples: int | None,
    seq_len: int,
    seed: int,
    purpose: Purpose,
    default_samples: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokens:
    """Token ids of ``samples`` sequences of at most ``seq_len`` tokens (never longer than the model's
    context). ``samples`` None means ``default_samples``, or all rows of a shorter ``.safetensors``.

    Raises:
        InputError: the source is missing, empty, too short, has the wrong columns, or holds ids
            outside the model's vocabulary.
    """
    if samples is not None and samples < 1:
        raise InputError(f"samples {samples} must be at least 1")
    if seq_len < 2:
        raise InputError(f"seq-len {seq_len} must be at least 2: one token to predict from one")
    limit = context_length(model.config)
    length = min(seq_len, limit) if limit else seq_len
    wanted = samples if samples is not None else default_samples
    if source == "self":
        ids = sample(model, wanted, length, seed_stream(seed, purpose), on_progress)
    elif source.endswith(".safetensors"):
        ids = _rows(Path(source), samples, default_samples, length)
    else:
        if tokenizer is None:
            raise InputError(
                f"text source {source!r} is text, but the model folder has no tokenizer: use "
                "'self' or a .safetensors file of input_ids"
            )
        ids = _pack(_documents(source, seed, purpose), tokenizer, wanted, length, source)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"{source} holds the token id {wrong}, outside the model's vocabulary of {vocabulary}: "
            "was it tokenized for another model?"
        )
    ids = ids.contiguous()
    return Tokens(ids, source, hashlib.sha256(ids.numpy().tobytes()).hexdigest())


@torch.no_grad()
def sample(
    model: Any,
    samples: int,
    length: int,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Sequences the model writes itself at temperature 1: int64 [samples, length].

    Each starts with the model's BOS token, or where it has none with a token drawn at random (as in
    LLM-QAT, arXiv 2305.17888, section 2.1). Sampling does not touch the global random state.
    """
    if model.device.type == "cpu" and model.dtype != torch.float32:
        model = copy.deepcopy(model).float()  # most CPUs are many times slower in 16 bits
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    bos = model.config.get_text_config().bos_token_id
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        first = torch.full((samples, 1), bos, dtype=torch.long)
    else:
        first = torch.randint(vocabulary, (samples, 1), generator=generator)
    rows = []
    for start in range(0, samples, SAMPLING_BATCH):
        ids = first[start : start + SAMPLING_BATCH]
        written = [ids]
        cache = None
        for position in range(1, length):
            output = model(ids.to(model.device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            odds = output.logits[:, -1].float().softmax(-1).cpu()
            if not bool(torch.isfinite(odds).all()):
                raise NumericalError(
                    "the model's own predictions are not finite, so it cannot write text: check it, or "
                    "give another source"
                )
            ids = torch.multinomial(odds, 1, generator=generator)
            written.append(ids)
            if position % 32 == 0 or position + 1 == length:
                done = start * length + len(ids) * (position + 1)
                on_progress(done, samples * length)
        rows.append(torch.cat(written, dim=1))
    return torch.cat(rows)


def _rows(path: Path, samples: int | None, default_samples: int, length: int) -> Tensor:
    """Rows of a tensor file, cropped to ``length``."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            if "input_ids" not in names:
                raise InputError(
                    f"{path} has no tensor 'input_ids', only {', '.join(names) or 'none'}"
                )
            ids = stream.get_tensor("input_ids")
    except SafetensorError as error:
        raise InputError(f"{path} is not a valid safetensors file: {error}") from None
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{path}: input_ids must be int64 [n, len], got {ids.dtype} {list(ids.shape)}"
        )
    if ids.shape[0] == 0 or ids.shape[1] < 2:
        raise InputError(f"{path}: input_ids {list(ids.shape)} holds too little to predict")
    if samples is not None and ids.shape[0] < samples:
        raise InputError(
            f"{path} has {ids.shape[0]} sequences, {samples} were asked for: use --samples "
            f"{ids.shape[0]} or a longer file"
        )
    assert isinstance(ids, Tensor)
    return ids[: samples or default_samples, :length].to(torch.int64)


def _documents(source: str, seed: int, purpose: Purpose) -> Iterable[str]:
    """The documents of a text source, in order."""
    if source == "bundled":
        from srcr import bundled

        parts = (
            bundled.texts(64, seed_stream(seed, f"{purpose} {part}"), split=purpose)
            for part in itertools.count()
        )
        return itertools.chain.from_iterable(parts)
    if source.startswith("hf:"):
        return _hub(source)
    path = Path(source)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(
            f"text source {source!r} is not known: use bundled, self, a .txt, .jsonl, .parquet "
            "or .safetensors file, or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]"
        )
    if not path.is_file():
        raise InputError(f"text file {source} does not exist")
    documents = [text for text in readers[path.suffix](path) if text.strip()]
    if not documents:
        raise InputError(f"text file {source} is empty")
    return documents


def _read_txt(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_read_txt(path)[0].split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{path} line {number} has no string field 'text' (found: {keys})")
        documents.append(row["text"])
    return documents


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install 'srcr[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a valid parquet file: {error}") from None
    if "text" not in table.column_names:
        raise InputError(f"{path} has no column 'text' (found: {', '.join(table.column_names)})")
    values = table.column("text").to_pylist()
    if any(value is not None and not isinstance(value, str) for value in values):
        raise InputError(f"{path}: column 'text' does not hold strings")
    return [value for value in values if value]


def _hub(source: str) -> Iterable[str]:
    """Documents of ``hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]``, streamed."""
    parts = source.split(":")[1:]
    name, config, split, column = (parts + [""] * 4)[:4]
    if not name or len(parts) > 4:
        raise InputError(f"text source {source!r}: use hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} needs the datasets library: pip install 'srcr[hub]'") from None
    column = column or "text"
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get(column), str):
                raise InputError(
                    f"{source} has no text column {column!r} (found: {', '.join(row)})"
                )
            yield row[column]
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: file, network, name, script
        raise InputError(f"{source} cannot be read: {first_line(error)}") from None


def _pack(
    documents: Iterable[str], tokenizer: Any, samples: int, length: int, source: str
) -> Tensor:
    """Documents tokenized one after the other (each with the special tokens its tokenizer adds) and
    cut into rows; reading stops when there are enough."""
    stream: list[int] = []
    for text in documents:
        stream.extend(tokenizer(text, verbose=False)["input_ids"])
        if len(stream) >= samples * length:
            break
    full = len(stream) // length
    if full < samples:
        remedy = f"use --samples {full}, a shorter --seq-len" if full else "use a shorter --seq-len"
        raise InputError(
            f"{source} gives {len(stream)} tokens, enough for {full} sequences of {length}; {samples} "
            f"were asked for: {remedy} or more text"
        )
    return torch.tensor(stream[: samples * length], dtype=torch.long).view(samples, length)
