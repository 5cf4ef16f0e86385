"""Smaller models, as overlays: elements of couplings gone from the weights, and from the config's numbers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srcr.models.checkpoint import OpenModel
from srcr.models.topology import Coupling
from srcr.models.transformed import Change, Read, TransformedSource

#: Keys of configs that count hidden units of the feed-forward network.
WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner")


def narrower(
    opened: OpenModel, couplings: Sequence[Coupling], gone: Mapping[str, Sequence[int]]
) -> TransformedSource:
    """The weights without some elements of every block, and a config that says so."""
    removed: dict[str, dict[int, set[int]]] = {}
    for coupling in couplings:
        for port in (*coupling.producers, *coupling.consumers):
            entries = removed.setdefault(port.parameter, {}).setdefault(port.axis, set())
            entries.update(port.entries(gone[coupling.block]))
    changes: dict[str, Change] = {n: partial(_without, n, axes) for n, axes in removed.items()}
    size, block = couplings[0].size, couplings[0].block
    left = size - len(gone[block])
    text = opened.config.get_text_config()
    if couplings[0].kind == "channels":
        config = {key: left for key in WIDTH_KEYS if hasattr(text, key)}
    else:
        heads = text.num_attention_heads
        config = {
            _key(text, "num_attention_heads"): heads * left // size,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        }
        if hasattr(text, "num_key_value_heads"):
            config["num_key_value_heads"] = text.num_key_value_heads * left // size
    return TransformedSource(opened.source, changes, config=config)


def _without(name: str, axes: Mapping[int, set[int]], read: Read) -> Tensor:
    """A tensor without some entries along some axes."""
    tensor = read(name)
    for axis, entries in axes.items():
        left = [entry for entry in range(tensor.shape[axis]) if entry not in entries]
        tensor = tensor.index_select(axis, torch.tensor(left, device=tensor.device))
    return tensor


def shallower(opened: OpenModel, block: str) -> TransformedSource:
    """The weights without a block, those behind it renumbered, and a config that says so."""
    blocks = [b.name for b in opened.topology.blocks]
    index, names = blocks.index(block), opened.source.names()
    changes: dict[str, Change] = {}
    for before, behind in zip(blocks[index:], blocks[index + 1 :], strict=False):
        for name in names:
            if name.startswith(f"{behind}."):
                changes[f"{before}.{name.removeprefix(behind + '.')}"] = partial(_unchanged, name)
    text = opened.config.get_text_config()
    config: dict[str, Any] = {_key(text, "num_hidden_layers"): len(blocks) - 1}
    for key, value in text.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == len(blocks):
            config[key] = value[:index] + value[index + 1 :]
    removed = [name for name in names if name.startswith(f"{blocks[-1]}.")]
    return TransformedSource(opened.source, changes, removed, config)


def _unchanged(name: str, read: Read) -> Tensor:
    """A tensor as it is, to be shown under another name."""
    return read(name)


def _key(config: Any, name: str) -> str:
    """What a config calls the number that others call ``name``."""
    return str(config.attribute_map.get(name, name))
