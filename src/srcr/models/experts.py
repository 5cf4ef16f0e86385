"""Mixtures of experts: the stacks that transformers keeps their weights in, taken apart into linears.

Transformers 5 has one parameter for all experts' gate and up projections, [experts, rows, columns], and one
for their down projections, which nothing that looks for linears sees. Here each expert is a module of
linears, under the names that checkpoints on the hub have, and each is handed the tokens that are routed to
it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from srcr.models.matrices import MatrixRef

#: As how many tokens for each of its inputs a sample of all tokens of its layer counts in an expert's
#: statistics, beside those that are routed to it: what few tokens reach is known by the layer's
#: (docs/decisions/017).
PRIOR_TOKENS = 2.0


@dataclass(frozen=True, eq=False)
class Routing:
    """Of which tokens of a batch an expert's input is: ``ids`` [n], rising, of which the first ``count`` are
    routed to it, by the weights ``gates`` [count]; the others, counted on from the number of tokens, are a
    sample of all."""

    ids: Tensor
    count: int
    gates: Tensor

    @property
    def sampled(self) -> int:
        """How many tokens the sample has."""
        return len(self.ids) - self.count

    def factors(self, weight: float, gates: bool = False) -> Tensor:
        """What the tokens are multiplied by in the expert's statistics, [n, 1]: those of the sample weigh
        ``weight`` (infinite: they alone count), the others 1, or by ``gates`` the square of their routing
        weights, 1 in the mean. Powers of two, which leave the digits of 16-bit numbers alone."""
        routed = torch.ones_like(self.gates)
        if gates and self.count:
            routed = self.gates / self.gates.square().mean().sqrt().clamp_min(1e-12)
        sample = routed.new_full((self.sampled,), weight**0.5)
        if weight == float("inf"):
            routed, sample = torch.zeros_like(routed), torch.ones_like(sample)
        factors = torch.cat([routed, sample]).float().abs()
        return torch.exp2(torch.log2(factors).round()).to(self.gates.dtype)[:, None]


def routing_of(x: Tensor) -> Routing | None:
    """The routing of what a linear is given; None where it is given every token."""
    return getattr(x, "routing", None)


def in_common(left: Routing, right: Routing) -> tuple[Tensor, Tensor]:
    """The places in both of the tokens that two routings share, [m] each, in the same order."""
    shared = torch.isin(left.ids, right.ids)
    return shared.nonzero().view(-1), torch.isin(right.ids, left.ids).nonzero().view(-1)


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
        self.layout = layout_of(fused)
        self.count = count_experts(fused)
        self.sampling = False
        for number in range(self.count):
            self.add_module(str(number), Expert())
        for name, child in fused.named_children():
            self.add_module(name, child)
        for name, place in self.places().items():
            stack: Any = getattr(fused, place.parameter)
            expert_name, linear, key = name.split(".")
            expert, tensor = self.get_submodule(expert_name), place.view(stack)
            if key == "weight":
                rows, cols = tensor.shape
                expert.add_module(
                    linear,
                    nn.Linear(cols, rows, self.layout.bias, device="meta", dtype=tensor.dtype),
                )
            setattr(expert.get_submodule(linear), key, nn.Parameter(tensor, False))
        # Not a submodule: what it stacked is in the experts now.
        object.__setattr__(self, "bare", without_parameters(fused))

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
            gates = weights[tokens, place]
            y = self._run(
                expert, hidden_states[tokens], tokens, gates, hidden_states, index.shape[-1]
            )
            if y is not None:
                y = y * gates[:, None]
                result.index_add_(0, tokens, y.to(result.dtype))
        return result

    def _each_its_own(self, hidden_states: Tensor) -> Tensor:
        stacked = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        result, every = torch.zeros_like(stacked), stacked.sum(0) if self.sampling else stacked[0]
        for number, expert in enumerate(self.experts()):
            tokens = stacked[number].any(dim=-1).nonzero().view(-1)
            x = stacked[number, tokens]
            y = self._run(expert, x, tokens, x.new_ones(len(x)), every, 1)
            if y is not None:
                result[number, tokens] = y.to(result.dtype)
        return result.view(hidden_states.shape)

    def _run(
        self, expert: Expert, x: Tensor, tokens: Tensor, gates: Tensor, every: Tensor, k: int
    ) -> Tensor | None:
        """What an expert makes of the states ``x`` [n, width] of its ``tokens``; None where there are none. A
        sample of ``every`` state goes with them where that is wanted, ``k`` experts being meant for a
        token."""
        routing, count = Routing(tokens, len(tokens), gates.to(x.dtype)), len(tokens)
        if self.sampling:
            size = max(1, len(every) * k // self.count)
            sample = torch.arange(size, device=tokens.device) * len(every) // size
            x = torch.cat([x, every[sample]])
            routing = replace(routing, ids=torch.cat([tokens, len(every) + sample]))
        elif count == 0:
            return None
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
            hidden: Tensor = bare.act_fn(expert.up_proj(x))
            return hidden
        gate, up = expert.gate_proj(x), expert.up_proj(x)
        if not hasattr(bare, "_apply_gate"):
            hidden = bare.act_fn(gate) * up
        elif self.layout.interleaved:
            hidden = bare._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
        else:
            hidden = bare._apply_gate(torch.cat([gate, up], dim=-1))
        return hidden


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


def layout_of(fused: Any) -> Layout:
    """The layout of a module that stacks experts: by transformers' interface for them, else by its shapes."""
    if hasattr(fused, "is_transposed"):
        return Layout(
            fused.has_gate, fused.is_transposed, not fused.is_concatenated, fused.has_bias
        )
    gated = hasattr(fused, "gate_up_proj")
    first = fused.gate_up_proj if gated else fused.up_proj
    transposed = first.shape[1] == fused.down_proj.shape[2]
    return Layout(gated, transposed, False, hasattr(fused, "down_proj_bias"))


def count_experts(fused: Any) -> int:
    """How many experts a module stacks."""
    return int(fused.down_proj.shape[0])


def experts_of(module: nn.Module) -> dict[str, Experts]:
    """Every module of experts in ``module``, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, Experts)}


def routers_of(model: nn.Module) -> list[str]:
    """The linears that choose experts, or weigh what all tokens share: beside the experts, with as many rows
    or fewer. They stay in full precision."""
    counts = {name.rpartition(".")[0]: each.count for name, each in experts_of(model).items()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features <= counts.get(name.rpartition(".")[0], 0)
    ]


def sample_experts(module: nn.Module, wanted: bool = True) -> None:
    """From now on every expert in ``module`` is handed some tokens, whatever is routed to it."""
    for experts in experts_of(module).values():
        experts.sampling = wanted


@contextmanager
def sampling(module: nn.Module) -> Iterator[None]:
    """While this is open, every expert in ``module`` is handed some tokens, whatever is routed to it."""
    sample_experts(module)
    try:
        yield
    finally:
        sample_experts(module, wanted=False)


def without_parameters(module: nn.Module) -> nn.Module:
    """A shallow copy that holds no weights of its own."""
    bare = copy.copy(module)
    bare.__dict__ = {**module.__dict__, "_parameters": {}}
    return bare
