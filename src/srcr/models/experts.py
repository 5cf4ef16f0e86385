"""Mixtures of experts: the stacks that transformers keeps their weights in, taken apart into linears.

Transformers 5 has one parameter for all experts' gate and up projections, [experts, rows, columns], and one for
their down projections, which nothing that looks for linears sees. Here each expert is a module of linears, under
the names that checkpoints on the hub have, and each is handed the tokens that are routed to it.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srcr.errors import InputError
from srcr.models.matrices import MatrixRef

#: What a sample of all tokens weighs beside those that are routed to an expert of mean load: an expert that few
#: tokens reach is known by the layer's (docs/decisions/017).
PRIOR = 0.03
#: How far an expert taken apart may be from the stack, on random numbers.
TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Routing:
    """Of which tokens of a batch an expert's input is: ``ids`` [n], rising, of which the first ``count`` are
    routed to it and the others, counted on from the number of tokens, a sample of all; ``weights`` [n, 1]: what
    their squares weigh in its statistics, as factors."""

    ids: Tensor
    count: int
    weights: Tensor


def routing_of(x: Tensor) -> Routing | None:
    """The routing of what a linear is given; None where it is given every token."""
    return getattr(x, "routing", None)


def in_common(one: Routing, other: Routing) -> tuple[Tensor, Tensor]:
    """The places in both of the tokens that two routings share, [m] each, in the same order."""
    shared = torch.isin(one.ids, other.ids)
    return shared.nonzero().view(-1), torch.isin(other.ids, one.ids).nonzero().view(-1)


class Expert(nn.Module):
    """The linears of an expert."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


class Experts(nn.Module):
    """The experts of a layer, each a module of linears by its number, in place of the module ``fused`` that
    stacks them. Called as that is. ``sampling``: each is handed a sample of all tokens besides its own, whose
    outputs count for nothing."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.layout = _layout(fused)
        self.count = int(fused.down_proj.shape[0])
        self.sampling = False
        for number in range(self.count):
            self.add_module(str(number), Expert())
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name, place in self.places().items():
            stack: Any = getattr(fused, place.parameter)
            number, linear, key = name.split(".")
            expert, tensor = self.get_submodule(number), place.view(stack)
            if key == "weight":
                rows, cols = tensor.shape
                expert.add_module(
                    linear, nn.Linear(cols, rows, self.layout.bias, device="meta", dtype=tensor.dtype)
                )
            setattr(expert.get_submodule(linear), key, nn.Parameter(tensor, False))
        # Not a submodule: what it stacked is in the experts now.
        object.__setattr__(self, "bare", _without_parameters(fused))

    def places(self) -> dict[str, MatrixRef]:
        """Where each parameter of the experts lies in the stacks, by its name here."""
        return {
            f"{number}.{linear}.{key}": MatrixRef(
                f"{stack}{suffix}", number, self.layout.transposed, half, self.layout.interleaved
            )
            for number in range(self.count)
            for linear, (stack, half) in self.layout.stacks().items()
            for key, suffix in (("weight", ""), ("bias", "_bias"))
            if key == "weight" or self.layout.bias
        }

    def experts(self) -> Iterator[Expert]:
        """Every expert, in order."""
        for number in range(self.count):
            expert = self.get_submodule(str(number))
            assert isinstance(expert, Expert)
            yield expert

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the experts make of ``hidden_states`` [tokens, width], given the numbers of the experts
        [tokens, k] that each is routed to and their weights [tokens, k]; or, without those, of the states for
        each expert below each other, [experts x tokens, width], zeros where a token is not routed to it."""
        routing = [*args, *kwargs.values()]
        if not routing:
            return self._each_its_own(hidden_states)
        index, weights = routing[0], routing[1]
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.experts()):
            tokens, place = torch.where(index == number)
            order = tokens.argsort(stable=True)
            tokens, place = tokens[order], place[order]
            y = self._run(expert, hidden_states, tokens, hidden_states, index.shape[-1])
            if y is not None:
                y = y * weights[tokens, place, None]
                result.index_add_(0, tokens, y.to(result.dtype))
        return result

    def _each_its_own(self, hidden_states: Tensor) -> Tensor:
        stacked = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        result = torch.zeros_like(stacked)
        for number, expert in enumerate(self.experts()):
            tokens = stacked[number].any(dim=-1).nonzero().view(-1)
            y = self._run(expert, stacked[number], tokens, stacked.sum(0), 1)
            if y is not None:
                result[number, tokens] = y.to(result.dtype)
        return result.view(hidden_states.shape)

    def _run(
        self, expert: Expert, states: Tensor, tokens: Tensor, every: Tensor, k: int
    ) -> Tensor | None:
        """What an expert makes of ``states`` [n, width] at some ``tokens``; None where there are none. A sample
        of ``every`` state goes with them where that is wanted, ``k`` experts being meant for a token."""
        x, count = states[tokens], len(tokens)
        if self.sampling:
            size = max(1, len(every) * k // self.count)
            sample = torch.arange(size, device=tokens.device) * len(every) // size
            x = torch.cat([x, every[sample]])
            weights = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
            weights[count:] = PRIOR**0.5
            routing = Routing(torch.cat([tokens, len(every) + sample]), count, weights)
        elif count == 0:
            return None
        else:
            routing = Routing(tokens, count, torch.ones(count, 1, dtype=x.dtype, device=x.device))
        x.routing = routing  # type: ignore[attr-defined]
        hidden = self._hidden(expert, x)
        hidden.routing = routing  # type: ignore[attr-defined]
        y: Tensor = expert.down_proj(hidden)
        y = y[:count]
        norm = getattr(self, "post_expert_norm", None)
        return y if norm is None else norm(y)

    def _hidden(self, expert: Expert, x: Tensor) -> Tensor:
        """The hidden units [n, units] of an expert, as the fused module computes them."""
        bare: Any = self.bare
        if not self.layout.gated:
            result: Tensor = bare.act_fn(expert.up_proj(x))
            return result
        gate, up = expert.gate_proj(x), expert.up_proj(x)
        if self.layout.interleaved:
            both = torch.stack([gate, up], dim=-1).flatten(-2)
        else:
            both = torch.cat([gate, up], dim=-1)
        if hasattr(bare, "_apply_gate"):
            result = bare._apply_gate(both)
            return result
        return bare.act_fn(gate) * up  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Layout:
    """How a module stacks its experts: ``gated`` with a gate beside the up projection, in one stack, rows of
    both ``interleaved`` or one below the other; ``transposed`` to [columns, rows]; with a ``bias``."""

    gated: bool
    transposed: bool
    interleaved: bool
    bias: bool

    def stacks(self) -> dict[str, tuple[str, int | None]]:
        """The stack of each linear, and which half of its rows (None: all)."""
        if not self.gated:
            return {"up_proj": ("up_proj", None), "down_proj": ("down_proj", None)}
        both = "gate_up_proj"
        return {"gate_proj": (both, 0), "up_proj": (both, 1), "down_proj": ("down_proj", None)}


def _layout(fused: Any) -> Layout:
    """The layout of a module that stacks experts: by transformers' interface for them, else by its shapes."""
    if hasattr(fused, "is_transposed"):
        return Layout(
            fused.has_gate, fused.is_transposed, not fused.is_concatenated, fused.has_bias
        )
    gated = hasattr(fused, "gate_up_proj")
    first = fused.gate_up_proj if gated else fused.up_proj
    transposed = first.shape[1] == fused.down_proj.shape[2]
    return Layout(gated, transposed, False, hasattr(fused, "down_proj_bias"))


def stacks_experts(module: nn.Module) -> bool:
    """Whether a module stacks experts as transformers does."""
    stacks = {name for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    return stacks in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"})


def unfuse(model: Any) -> Any:
    """``model`` itself, every module that stacks experts taken apart; the linears share the stacks' memory.

    Raises:
        InputError: an expert taken apart gives another output than the stack: a layout that is not known.
    """
    checked: set[type] = set()
    for name, module in list(model.named_modules()):
        if stacks_experts(module):
            if type(module) not in checked:
                _check(module, name)
                checked.add(type(module))
            _put(model, name, Experts(module))
    return model


def fuse(model: Any) -> Any:
    """``model`` itself, its experts in stacks again, as transformers has them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts):
            _put(model, name, _stacked(module))
    return model


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """Every module of experts in ``module``, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Experts)}


def routers_of(model: nn.Module) -> list[str]:
    """The linears that choose experts, or weigh what all tokens share: beside the experts, with as many rows or
    fewer. They stay in full precision."""
    counts = {name.rpartition(".")[0]: each.count for name, each in experts_of(model).items()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features <= counts.get(name.rpartition(".")[0], 0)
    ]


@contextmanager
def sampling(module: nn.Module) -> Iterator[None]:
    """While this is open, every expert in ``module`` is handed some tokens, whatever is routed to it."""
    experts = experts_of(module).values()
    for each in experts:
        each.sampling = True
    try:
        yield
    finally:
        for each in experts:
            each.sampling = False


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, module)


def _without_parameters(module: nn.Module) -> nn.Module:
    """A shallow copy that holds no weights of its own."""
    bare = copy.copy(module)
    bare.__dict__ = {**module.__dict__, "_parameters": {}}
    return bare


def _stacked(experts: Experts) -> nn.Module:
    """The fused module of some experts, with stacks of its own."""
    bare: Any = experts.bare
    fused = _without_parameters(bare)
    parts: dict[str, dict[int, dict[int, Tensor]]] = {}
    state: Mapping[str, Tensor] = experts.state_dict()
    for name, place in experts.places().items():
        stack = parts.setdefault(place.parameter, {})
        stack.setdefault(place.index, {})[place.half or 0] = state[name]
    for parameter, stack in parts.items():
        matrices = [_joined(stack[i], experts.layout.interleaved) for i in range(experts.count)]
        if experts.layout.transposed and matrices[0].ndim == 2:
            matrices = [matrix.T for matrix in matrices]
        fused.register_parameter(parameter, nn.Parameter(torch.stack(matrices), False))
    return fused


def _joined(halves: Mapping[int, Tensor], interleaved: bool) -> Tensor:
    """Rows of a gate and an up projection in one tensor; a single one as it is."""
    if len(halves) == 1:
        return halves[0]
    if interleaved:
        return torch.stack([halves[0], halves[1]], dim=1).flatten(0, 1)
    return torch.cat([halves[0], halves[1]])


@torch.no_grad()
def _check(fused: Any, name: str) -> None:
    """Compare the module with what it is taken apart to, in small and on random numbers.

    Raises:
        InputError: they differ.
    """
    small: Any = _without_parameters(fused)
    small._modules = {
        key: nn.Identity() if any(True for _ in child.parameters()) else child
        for key, child in fused._modules.items()
    }
    layout, (width, units) = _layout(fused), (8, 6)
    count = int(fused.down_proj.shape[0])
    generator = torch.Generator().manual_seed(0)
    for key, stack in fused._parameters.items():
        rows = width if key.startswith("down") else units * (1 + layout.gated)
        cols = units if key.startswith("down") else width
        shape = (rows,) if stack.ndim == 2 else (cols, rows) if layout.transposed else (rows, cols)
        numbers = torch.randn(count, *shape, generator=generator)
        small.register_parameter(key, nn.Parameter(numbers, False))
    for key in ("hidden_size", "hidden_dim"):
        if hasattr(small, key):
            setattr(small, key, width)
    k = min(2, count)
    states = torch.randn(5, width, generator=generator)
    index = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(5)])
    routing: tuple[Tensor, ...] = (index, torch.rand(5, k, generator=generator))
    if not hasattr(fused, "is_transposed"):
        states, routing = torch.randn(5 * count, width, generator=generator), ()
    try:
        forward = inspect.unwrap(type(fused).forward)
        expected, given = forward(small, states, *routing), Experts(small)(states, *routing)
        known = bool(torch.allclose(expected, given, atol=TOLERANCE, rtol=TOLERANCE))
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
        known = False
    if not known:
        raise InputError(
            f"{name} ({type(fused).__name__}) stacks experts in a way that srcr does not know: only layouts "
            "of transformers' expert interface are supported"
        )
