"""What a model is made of, found by watching it run: no tables of names.

A model is traced once on a few tokens. Decoder blocks are the module list that holds most of the
linear weights and whose members run one after the other; linears that are handed the very same
tensor share an input, hence a Hessian.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from srcr.errors import InputError
from srcr.models.guard import guest
from srcr.models.load import output_head

Linear = nn.Linear | Conv1D


@dataclass(frozen=True)
class Unit:
    """Linears of one block that share an input, in the order they run: names within the block."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One decoder block: its module name and its units in the order their inputs are computed."""

    name: str
    units: tuple[Unit, ...]

    def linears(self) -> tuple[str, ...]:
        """Full module names of the block's linears."""
        return tuple(f"{self.name}.{name}" for unit in self.units for name in unit.names)


@dataclass(frozen=True)
class Topology:
    """``shapes`` maps each linear's full name to (out_features, in_features), ``conv1d`` names those
    stored transposed (GPT-2), ``head`` is the output embedding, ``tied`` whether it shares its
    weight with the input embedding, ``tuples`` whether blocks return tuples."""

    blocks: tuple[Block, ...]
    shapes: dict[str, tuple[int, int]]
    conv1d: frozenset[str]
    head: str | None
    tied: bool
    tuples: bool

    def linears(self) -> Iterator[str]:
        """Full names of every linear of the decoder blocks, in the order they run."""
        for block in self.blocks:
            yield from block.linears()


def linear_weight(module: nn.Module) -> Tensor:
    """A linear's weight as [out_features, in_features], whatever way it is stored (a view)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if isinstance(module, Conv1D) else weight


def set_linear_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a linear another weight [out_features, in_features], stored in its way; the old one stays as it
    is for whoever else holds it."""
    stored = weight.T if isinstance(module, Conv1D) else weight
    module._parameters["weight"] = nn.Parameter(stored, False)


def home_of(model: Any) -> torch.device:
    """Where a model runs: an empty one, filled while it runs, in main memory."""
    found: torch.device = model.device
    return torch.device("cpu") if found.type == "meta" else found


@torch.no_grad()
def observe(model: Any) -> Topology:
    """Trace ``model`` on eight tokens and describe it.

    Raises:
        InputError: no decoder blocks are found, or blocks hold weights that are not plain linears
            (fused experts), that run more than once, or that the trace does not reach.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    members = {id(child): f"{n}.{i}" for n, m in lists.items() for i, child in enumerate(m)}

    calls: list[tuple[str, Tensor]] = []  # linears in the order they run, with what they are given
    steps: list[str] = []  # members of module lists in the order they run
    returned: dict[str, bool] = {}
    handles = []
    for name, module in linears.items():

        def on_linear(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            calls.append((name, args[0]))

        handles.append(module.register_forward_pre_hook(on_linear))
    for module in model.modules():
        if id(module) not in members:
            continue

        def on_member(
            _: nn.Module, args: Any, output: Any, name: str = members[id(module)]
        ) -> None:
            steps.append(name)
            returned[name] = isinstance(output, tuple)

        handles.append(module.register_forward_hook(on_member))
    try:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(8) * 7 + 3) % vocabulary
        with guest(f"{type(model).__name__} does not run"):
            model(tokens[None].to(home_of(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    ran = set(steps)
    sizes = {
        n: sum(w.weight.numel() for k, w in linears.items() if k.startswith(n + "."))
        for n, m in lists.items()
        if all(f"{n}.{i}" in ran for i in range(len(m)))
    }
    if not sizes or max(sizes.values()) == 0:
        fused = _fused(model, "")
        what = f"; its weight {fused} is a stack of matrices" if fused else ""
        raise InputError(
            f"{type(model).__name__} has no decoder blocks that srcr recognises: no list of modules "
            f"that hold linear layers and run one after the other{what}"
        )
    home = max(sizes, key=lambda n: (sizes[n], -len(n)))
    blocks = []
    for i in range(len(lists[home])):
        block = f"{home}.{i}"
        _check_block(model, block, [n for n in linears if n.startswith(block + ".")], calls)
        blocks.append(Block(block, _units(block, calls)))
    inside = [n for n in linears if n.startswith(home + ".")]
    shapes = {n: _shape(linear_weight(linears[n])) for n in inside}
    head = output_head(model)
    embedding = model.get_input_embeddings().weight
    return Topology(
        blocks=tuple(blocks),
        shapes=shapes,
        conv1d=frozenset(n for n in inside if isinstance(linears[n], Conv1D)),
        head=head,
        tied=head is not None and model.get_submodule(head).weight is embedding,
        tuples=returned[f"{home}.0"],
    )


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _units(block: str, calls: list[tuple[str, Tensor]]) -> tuple[Unit, ...]:
    """Group the linears of ``block`` by the tensor they were given (same memory, same view)."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, x in calls:
        if name.startswith(block + "."):
            key = (x.data_ptr(), tuple(x.shape), x.stride())
            groups.setdefault(key, []).append(name.removeprefix(block + "."))
    return tuple(Unit(tuple(names)) for names in groups.values())


def _check_block(model: Any, block: str, names: list[str], calls: list[tuple[str, Tensor]]) -> None:
    fused = _fused(model.get_submodule(block), block)
    if fused:
        raise InputError(
            f"{fused} is a stack of matrices (fused mixture-of-experts weights), which srcr cannot "
            "compress: only models whose blocks are made of linear layers are supported"
        )
    count = {name: sum(1 for called, _ in calls if called == name) for name in names}
    for name, times in count.items():
        if times != 1:
            how = "does not run" if times == 0 else f"runs {times} times"
            raise InputError(
                f"{name} {how} in a forward pass (a mixture of experts, or shared layers): srcr "
                "supports models whose linear layers each run once"
            )


def _fused(module: nn.Module, prefix: str) -> str | None:
    """A parameter that stacks several matrices, outside convolutions: its name and shape."""
    for name, child in module.named_modules(prefix=prefix):
        if type(child).__name__.startswith("Conv"):
            continue
        for key, parameter in child.named_parameters(recurse=False):
            if parameter.ndim >= 3:
                return f"{name}.{key} {list(parameter.shape)}"
    return None
