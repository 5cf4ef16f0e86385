"""The topology of a model, seen by watching it run: no tables of names.

A model is traced on a few tokens. Decoder blocks are the module list that holds most of the linear
weights and whose members run in their order; linears that are handed the very same tensor share an input,
hence a Hessian.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from srcr.errors import InputError
from srcr.models.experts import experts_of, routers_of, sampling
from srcr.models.matrices import MatrixRef
from srcr.models.naming import reads_parts, stored_places
from srcr.models.reloading import needs_weights
from srcr.models.streaming import device_of
from srcr.models.topology import Block, Coupling, LinearGroup, Topology
from srcr.models.validation import library_errors

#: Tokens that a model is traced on.
TRACED_TOKENS = 8
#: What can be asked of a tensor without its numbers.
PROPERTIES = (Tensor.device, Tensor.dtype, Tensor.shape, Tensor.ndim, Tensor.is_meta)


@dataclass(frozen=True, eq=False)
class _Trace:
    """What a forward pass showed: linears in the order they ran with what they were given, members of
    module lists in the order they ran, what each returned (as :attr:`Topology.returns`), and the names of
    the tensors that were used otherwise than by a linear."""

    calls: list[tuple[str, Tensor]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    returns: dict[str, tuple[bool, ...] | None] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


class _Uses(TorchFunctionMode):
    """Notes which tensors of a model functions are given, by their names in it."""

    def __init__(self, model: nn.Module, used: set[str]) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            self._names.setdefault(id(tensor), []).append(name)
        self._used = used

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = getattr(func, "__self__", None)
        if not any(owner is known for known in PROPERTIES):
            for value in tree_leaves((args, kwargs or {})):
                self._used.update(self._names.get(id(value), ()))
        return func(*args, **(kwargs or {}))


def observe(
    model: Any, find_couplings: Callable[[Topology], tuple[Coupling, ...]] = lambda _: ()
) -> Topology:
    """The topology of ``model``, which must be ready to run (with stand-in weights, say).

    Raises:
        InputError: there are no decoder blocks, or blocks hold weights that are not plain linears
            (fused experts), that run more than once, or that the trace does not reach.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    routers = routers_of(model)
    for name in routers:
        del linears[name]
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    try:
        with sampling(model):
            trace = _trace(model, linears, lists)
    except InputError:
        _refuse_stacks(_stacks(model, ""), _width(model))  # stand-ins for one may not run
        raise
    home = _home_of_blocks(model, linears, lists, trace)
    experts = {name: each.count for name, each in experts_of(model).items()}
    blocks: list[Block] = []
    untouched = list(routers)
    stacks: list[str] = []
    for i in range(len(lists[home])):
        block = f"{home}.{i}"
        untouched += _untouched(block, linears, trace)
        stacks += _small_stacks(model, block)
        within = tuple(name for name in experts if name.startswith(f"{block}."))
        blocks.append(Block(block, _groups(block, trace.calls), within))
    inside = [name for block in blocks for name in block.linears()]
    head = output_head(model)
    untouched += [n for n in linears if not n.startswith(home + ".") and n != head]
    embedding = model.get_input_embeddings().weight
    tables = _embeddings(model)
    return Topology(
        blocks=tuple(blocks),
        matrices={n: _matrix(n, linears[n]) for n in inside},
        shapes={n: _shape(linears[n]) for n in inside},
        head=head,
        tied=head is not None and model.get_submodule(head).weight is embedding,
        embeddings={n: MatrixRef(f"{n}.weight") for n in tables},
        embedding_shapes=tables,
        others=_others(model, home, trace),
        untouched=tuple(untouched),
        stacks=tuple(stacks),
        returns=trace.returns[f"{home}.0"],
        experts=experts,
        stored=stored_places(model),
        find_couplings=find_couplings,
        find_needs=lambda topology: _needs_weights(model, topology),
    )


def _needs_weights(model: nn.Module, topology: Topology) -> bool:
    """Whether transformers cannot load the linears from packed codes: it asks them for their weights, or
    knows nothing else by the name that a weight is stored under."""
    shared = (topology.matrix(n).parameter for n in topology.linears() if not topology.routed(n))
    if not reads_parts(model, topology.stored, shared):
        return True
    return needs_weights(model, topology.linears())


def _others(model: nn.Module, home: str, trace: _Trace) -> tuple[str, ...]:
    """The tensors outside the blocks that the forward pass used."""
    ran = {name for name, _ in trace.calls}
    return tuple(
        name
        for name in model.state_dict()
        if not name.startswith(home + ".")
        and (name in trace.used or name.rpartition(".")[0] in ran)
    )


def _embeddings(model: Any) -> dict[str, tuple[int, int]]:
    """The shapes of the input embedding and of a head that does not share its weight, by module name; the
    first of the two stands for both where they share it."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    shapes: dict[int, tuple[str, tuple[int, int]]] = {}
    for name, module in model.named_modules():
        if any(module is each for each in wanted) and module.weight.ndim == 2:
            shapes.setdefault(id(module.weight), (name, (*module.weight.shape,)))
    return dict(shapes.values())


def output_head(model: nn.Module) -> str | None:
    """The module name of the output embedding, whatever the architecture calls it."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is head), None)


@torch.no_grad()
def _trace(
    model: Any, linears: Mapping[str, nn.Module], lists: Mapping[str, nn.ModuleList]
) -> _Trace:
    members = {id(child): f"{n}.{i}" for n, m in lists.items() for i, child in enumerate(m)}
    trace = _Trace()
    handles = []
    for name, module in linears.items():

        def on_linear(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            trace.calls.append((name, args[0]))

        handles.append(module.register_forward_pre_hook(on_linear))
    for module in model.modules():
        if id(module) not in members:
            continue

        def on_member(
            _: nn.Module, args: Any, output: Any, name: str = members[id(module)]
        ) -> None:
            trace.steps.append(name)
            trace.returns[name] = (
                tuple(isinstance(value, Tensor) for value in output[1:])
                if isinstance(output, tuple | list)
                else None
            )

        handles.append(module.register_forward_hook(on_member))
    try:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(TRACED_TOKENS) * 7 + 3) % vocabulary
        with (
            library_errors(f"{type(model).__name__} does not run"),
            _Uses(model, trace.used),
        ):
            model(tokens[None].to(device_of(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _home_of_blocks(
    model: Any,
    linears: Mapping[str, nn.Module],
    lists: Mapping[str, nn.ModuleList],
    trace: _Trace,
) -> str:
    """The module list that holds the decoder blocks: all its members ran, and hold most linear weights."""
    ran = set(trace.steps)
    sizes = {
        n: sum(rows * cols for k, module in linears.items() if k.startswith(n + ".")
               for rows, cols in [_shape(module)])
        for n, m in lists.items()
        if all(f"{n}.{i}" in ran for i in range(len(m)))
    }  # fmt: skip
    if not sizes or max(sizes.values()) == 0:
        stack = next(iter(_stacks(model, "").items()), None)
        what = f"; its weight {stack[0]} {list(stack[1])} is a stack of matrices" if stack else ""
        raise InputError(
            f"{type(model).__name__} has no decoder blocks that srcr recognises: no list of modules "
            f"that hold linear layers and run one after the other{what}"
        )
    return max(sizes, key=lambda n: (sizes[n], -len(n)))


def _matrix(name: str, module: nn.Module) -> MatrixRef:
    """Where the weight of a linear lies."""
    parameters = module.named_parameters(prefix=name, recurse=False)
    parameter = next(key for key, tensor in parameters if tensor is module.weight)
    return MatrixRef(parameter, None, _transposed(module))


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, cols = weight.T.shape if _transposed(module) else weight.shape
    return rows, cols


def _groups(block: str, calls: list[tuple[str, Tensor]]) -> tuple[LinearGroup, ...]:
    """The linears of ``block`` grouped by the tensor they were given (same memory, same view)."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, x in calls:
        if name.startswith(block + "."):
            key = (x.data_ptr(), tuple(x.shape), x.stride())
            groups.setdefault(key, []).append(name)
    return tuple(LinearGroup(tuple(names)) for names in groups.values())


def _small_stacks(model: Any, block: str) -> list[str]:
    """The stacks of matrices of a block, which are left as they are.

    Raises:
        InputError: one is made for hidden states, as experts are.
    """
    stacks = _stacks(model.get_submodule(block), block)
    _refuse_stacks(stacks, _width(model))
    return list(stacks)


def _untouched(block: str, linears: Mapping[str, nn.Module], trace: _Trace) -> list[str]:
    """The linears of a block that are left as they are: it uses their weights without calling them.

    Raises:
        InputError: a linear does not run, or more than once.
    """
    untouched = []
    calls = Counter(name for name, _ in trace.calls)
    for name in (name for name in linears if name.startswith(block + ".")):
        if calls[name] == 0 and f"{name}.weight" in trace.used:
            untouched.append(name)
        elif calls[name] != 1:
            how = "does not run" if calls[name] == 0 else f"runs {calls[name]} times"
            raise InputError(
                f"{name} {how} in a forward pass over text (a mixture of experts, shared layers, or a "
                "decoder that needs an encoder): srcr supports models whose linear layers each run once"
            )
    return untouched


def _width(model: Any) -> int:
    """Numbers of a token's embedding."""
    return int(model.get_input_embeddings().weight.shape[1])


def _refuse_stacks(stacks: Mapping[str, torch.Size], width: int) -> None:
    for name, shape in stacks.items():
        if width in shape:
            raise InputError(
                f"{name} {list(shape)} is a stack of matrices (fused mixture-of-experts weights), which srcr "
                "cannot compress: only models whose blocks are made of linear layers are supported"
            )


def _stacks(module: nn.Module, prefix: str) -> dict[str, torch.Size]:
    """The parameters that stack several matrices, outside convolutions, by name."""
    return {
        f"{name}.{key}": parameter.shape
        for name, child in module.named_modules(prefix=prefix)
        if not type(child).__name__.startswith("Conv")
        for key, parameter in child.named_parameters(recurse=False)
        if sum(size > 1 for size in parameter.shape) >= 3
    }
