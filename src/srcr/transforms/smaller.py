"""Smaller models, as overlays: elements of couplings gone from the weights, and from the config's numbers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.models.checkpoint import OpenModel
from srcr.models.topology import Coupling
from srcr.models.transformed import Change, Read, TransformedSource

#: Keys of configs that count hidden units of the feed-forward network.
WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


@dataclass(frozen=True)
class Removal:
    """The ``elements`` of a coupling that go."""

    coupling: Coupling
    elements: tuple[int, ...]


def narrower(
    opened: OpenModel,
    removals: Sequence[Removal],
    compensated: Mapping[str, Change] | None = None,
) -> TransformedSource:
    """The weights without some elements of every block's couplings, and a config that says so.
    ``compensated``: what parameters are instead of what is left of them, in the same shape, by name."""
    removed: dict[str, dict[int, set[int]]] = {}
    for removal in removals:
        for port in (*removal.coupling.producers, *removal.coupling.consumers):
            entries = removed.setdefault(port.parameter, {}).setdefault(port.axis, set())
            entries.update(port.entries(removal.elements))
    replaced = compensated or {}
    changes: dict[str, Change] = {
        name: partial(_without, name, axes, replaced.get(name)) for name, axes in removed.items()
    }
    config: dict[str, Any] = {}
    for removal in removals:  # of every block: the numbers are the same in all
        config |= _narrower_config(opened, removal)
    return TransformedSource(opened.source, changes, config=config)


def _narrower_config(opened: OpenModel, removal: Removal) -> dict[str, Any]:
    """The keys of the config that count what is removed, with what is left."""
    text, size = text_config(opened), removal.coupling.size
    left = size - len(removal.elements)
    if removal.coupling.kind == "channels":
        return {key: left for key in WIDTH_KEYS if hasattr(text, key)}
    heads = text.num_attention_heads
    config = {
        _key(text, "num_attention_heads"): heads * left // size,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }
    if hasattr(text, "num_key_value_heads"):
        config["num_key_value_heads"] = text.num_key_value_heads * left // size
    return config


def _without(
    name: str, axes: Mapping[int, set[int]], compensated: Change | None, read: Read
) -> Tensor:
    """A tensor without some entries along some axes, or what is in its place."""
    tensor = read(name)
    if compensated is not None and not tensor.is_meta:
        return compensated(read)
    for axis, entries in axes.items():
        left = [entry for entry in range(tensor.shape[axis]) if entry not in entries]
        tensor = tensor.index_select(axis, torch.tensor(left, device=tensor.device))
    return tensor


def shallower(opened: OpenModel, gone: Collection[int]) -> TransformedSource:
    """The weights without the blocks of some numbers, those behind them renumbered, and a config that says
    so."""
    blocks, names = opened.topology.block_names(), opened.source.names()
    kept = [index for index in range(len(blocks)) if index not in gone]
    changes: dict[str, Change] = {}
    for number, index in enumerate(kept):
        for name in names:
            if number != index and name.startswith(f"{blocks[index]}."):
                rest = name.removeprefix(f"{blocks[index]}.")
                changes[f"{blocks[number]}.{rest}"] = partial(unchanged, name)
    text = text_config(opened)
    config: dict[str, Any] = {_key(text, "num_hidden_layers"): len(kept)}
    for key, value in text.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == len(blocks):
            config[key] = [value[index] for index in kept]
    last = tuple(f"{name}." for name in blocks[len(kept) :])
    removed = [name for name in names if name.startswith(last)]
    return TransformedSource(opened.source, changes, removed, config)


def unchanged(name: str, read: Read) -> Tensor:
    """A tensor as it is, to be shown under another name."""
    return read(name)


def text_config(opened: OpenModel) -> Any:
    """The config of the language model.

    Raises:
        InputError: it is part of another.
    """
    text = opened.config.get_text_config()
    if text is not opened.config:
        raise InputError(
            f"{opened.architecture} has its language model's config inside another: srcr removes no "
            "structures of such models"
        )
    return text


def _key(config: Any, name: str) -> str:
    """What a config calls the number that others call ``name``."""
    return str(config.attribute_map.get(name, name))
