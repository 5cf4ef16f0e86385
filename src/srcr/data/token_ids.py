"""Rows of token ids that are there already: in a file, or in memory."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader

from srcr.data.padding import stack_rows
from srcr.data.tokens import LanguageModel, Tokens, bos_token, context_length
from srcr.errors import InputError


def holds_ids(source: Any) -> bool:
    """Whether a source is token ids: a ``.safetensors`` file, a tensor, lists of numbers, a DataLoader."""
    if isinstance(source, str):
        return source.endswith(".safetensors")
    if isinstance(source, Tensor | Tokens | DataLoader):
        return True
    rows = source if isinstance(source, list | tuple) else []
    return len(rows) > 0 and isinstance(rows[0], list | tuple)


def read_rows(source: Any, name: str, samples: int | None, most: int) -> Tokens:
    """The first ``samples`` rows (None: at most ``most``) of a source with :func:`holds_ids`; a file's
    ``attention_mask`` says which tokens are padding.

    Raises:
        InputError: it holds no token ids, or fewer rows than ``samples``.
    """
    if isinstance(source, DataLoader):
        return _loaded_rows(source, name, samples, most)
    lengths = mask = None
    ids = source
    if isinstance(source, str):
        ids, mask = _read_file(Path(source))
    elif not isinstance(source, Tensor):
        ids, lengths = stack_rows(source, name)
    check_shape(ids, name)
    if samples is not None and ids.shape[0] < samples:
        raise InputError(
            f"{name} has {ids.shape[0]} sequences, {samples} were asked for: use --samples "
            f"{ids.shape[0]} or a longer file"
        )
    count = samples or most
    if mask is not None:
        mask = mask[:count] if mask.ndim else mask
    elif lengths is not None:
        mask = torch.arange(ids.shape[1]) < lengths[:count, None]
    tokens = Tokens.of(ids[:count], name, mask)
    left_out = ids[:count].numel() - tokens.n_tokens
    if isinstance(source, str) and left_out:
        note = f"{name}: {left_out} tokens are padding by its attention_mask, and are left out"
        tokens = replace(tokens, notes=(note,))
    return tokens


def check_shape(ids: Tensor, name: str) -> None:
    """Refuse what are no rows of token ids.

    Raises:
        InputError: not int64 or int32 [n, len], or nothing to predict.
    """
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{name}: input_ids must be int64 [n, len], got {ids.dtype} {list(ids.shape)}"
        )
    if ids.shape[0] == 0 or ids.shape[1] < 2:
        raise InputError(f"{name}: input_ids {list(ids.shape)} holds too little to predict")


def check_vocabulary(tokens: Tokens, vocabulary: int) -> None:
    """Refuse ids that the model does not have.

    Raises:
        InputError: names the id.
    """
    lowest, highest = int(tokens.input_ids.min()), int(tokens.input_ids.max())
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise InputError(
            f"{tokens.source} holds the token id {wrong}, outside the model's vocabulary of {vocabulary}: "
            "was it tokenized for another model?"
        )


def check_tokens(tokens: Tokens, model: LanguageModel) -> Tokens:
    """The same token ids, which the model can be given.

    Raises:
        InputError: they are not int64 [n, len], too few, longer than the model's context, or outside its
            vocabulary.
    """
    check_shape(tokens.input_ids, tokens.source)
    check_vocabulary(tokens, model.vocabulary)
    limit, length = context_length(model.config), tokens.input_ids.shape[1]
    if limit is not None and length > limit:
        raise InputError(
            f"{tokens.source}: rows of {length} tokens are longer than the model's context of {limit}"
        )
    return with_prefix(tokens, model.config)


def with_prefix(tokens: Tokens, config: Any) -> Tokens:
    """The tokens with the config's BOS as their prefix, where every row begins with it and no prefix is
    known."""
    bos = bos_token(config)
    if tokens.prefix or bos is None or not bool((tokens.input_ids[:, 0] == bos).all()):
        return tokens
    return replace(tokens, prefix=(bos,))


def _loaded_rows(loader: "DataLoader[Any]", name: str, samples: int | None, most: int) -> Tokens:
    """The first rows of the batches that a DataLoader gives: token ids [n, len], or a mapping with
    ``input_ids`` and, where rows are padded, an ``attention_mask``."""
    parts: list[Tokens] = []
    count, wanted = 0, samples or most
    for batch in loader:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if isinstance(ids, list | tuple) and len(ids) == 1:  # of a TensorDataset
            ids = ids[0]
        if not isinstance(ids, Tensor):
            raise InputError(
                f"{name}: a batch of the DataLoader holds no tensor of token ids [n, len], alone or as "
                "input_ids: give texts as a list of strings or a datasets.Dataset"
            )
        check_shape(ids, name)
        ids, left = ids[: wanted - count], wanted - count
        parts.append(Tokens.of(ids, name, None if mask is None else mask[:left]))
        count += len(ids)
        if count == wanted:
            break
    if samples is not None and count < samples:
        raise InputError(f"{name} gives {count} sequences, {samples} were asked for")
    if not parts:
        raise InputError(f"{name} gives nothing")
    joined = Tokens.joined(parts)
    return replace(joined, source=name)


def _read_file(path: Path) -> tuple[Tensor, Tensor | None]:
    """The tensors ``input_ids`` and, where there is one, ``attention_mask`` of a file."""
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as stream:
            names = list(stream.keys())
            if "input_ids" not in names:
                raise InputError(
                    f"{path} has no tensor 'input_ids', only {', '.join(names) or 'none'}"
                )
            mask = stream.get_tensor("attention_mask") if "attention_mask" in names else None
            return stream.get_tensor("input_ids"), mask
    except SafetensorError as error:
        raise InputError(f"{path} is not a valid safetensors file: {error}") from None
