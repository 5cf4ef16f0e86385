"""A model with fewer experts, as an overlay: the others renumbered, the router and the config narrower."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srcr.models.checkpoint import OpenModel
from srcr.models.transformed import Change, Read, TransformedSource
from srcr.transforms.smaller import text_config, unchanged

#: Parts of the keys of a config that count experts other than all that tokens are routed to.
OTHER_COUNTS = ("per_tok", "shared", "top_k", "topk", "zero")
#: Keys of configs that say to how many experts each token is routed.
CHOSEN_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k",
    "top_k_experts", "moe_k",
)  # fmt: skip
#: Keys of configs that say among how many groups of experts a router chooses first.
GROUP_KEYS = ("n_group", "num_expert_group", "num_expert_groups")


def fewer_experts(opened: OpenModel, gone: Mapping[str, Collection[int]]) -> TransformedSource:
    """The weights without some experts of every module of them, as many in each, and a config that says
    so."""
    changes: dict[str, Change] = {}
    removed: list[str] = []
    tensors = _tensors_of_experts(opened)
    left = 0
    for module, count in opened.topology.experts.items():
        kept = [number for number in range(count) if number not in gone[module]]
        left = len(kept)
        for number, old in enumerate(kept):
            for rest in tensors[module, old]:
                if number != old:
                    name = f"{module}.{old}.{rest}"
                    changes[f"{module}.{number}.{rest}"] = partial(unchanged, name)
        removed += [
            f"{module}.{number}.{rest}"
            for number in range(left, count)
            for rest in tensors[module, number]
        ]
        for name in _routing(opened, module, count):
            changes[name] = partial(_rows, name, kept)
    count = next(iter(opened.topology.experts.values()))
    config: dict[str, Any] = dict.fromkeys(expert_keys(opened, count), left)
    return TransformedSource(opened.source, changes, removed, config)


def expert_keys(opened: OpenModel, count: int) -> list[str]:
    """The keys of the config that say that tokens are routed to ``count`` experts."""
    return [
        key
        for key, value in text_config(opened).to_dict().items()
        if value == count and "expert" in key and not any(part in key for part in OTHER_COUNTS)
    ]


def chosen_experts(opened: OpenModel) -> int:
    """To how many experts each token is routed, by the config; 1 where it does not say."""
    return max(_numbers(opened, CHOSEN_KEYS), default=1)


def expert_groups(opened: OpenModel) -> int:
    """Among how many groups of neighbouring experts routers choose first; 1 where they do not."""
    return max(_numbers(opened, GROUP_KEYS), default=1)


def _numbers(opened: OpenModel, keys: Collection[str]) -> list[int]:
    """The whole numbers that a config has under some keys."""
    config = text_config(opened).to_dict()
    return [config[key] for key in keys if isinstance(config.get(key), int)]


def _tensors_of_experts(opened: OpenModel) -> dict[tuple[str, int], list[str]]:
    """What each expert's tensors are called within it, by its module and number."""
    tensors: dict[tuple[str, int], list[str]] = {}
    for name in opened.source.names():
        parts = name.rsplit(".", 3)
        if parts[0] in opened.topology.experts and parts[1].isdigit():
            tensors.setdefault((parts[0], int(parts[1])), []).append(f"{parts[2]}.{parts[3]}")
    return tensors


def _routing(opened: OpenModel, module: str, count: int) -> list[str]:
    """The tensors beside a module of experts that have a row for each: of the router, and what corrects
    it."""
    beside = f"{module.rpartition('.')[0]}."
    linears = opened.topology.parameters()
    return [
        name
        for name in opened.source.names()
        if name.startswith(beside)
        and not name.startswith(f"{module}.")
        and name not in linears
        and opened.source.meta(name).shape[:1] == (count,)
    ]


def _rows(name: str, kept: list[int], read: Read) -> Tensor:
    tensor = read(name)
    return tensor.index_select(0, torch.tensor(kept, device=tensor.device))
