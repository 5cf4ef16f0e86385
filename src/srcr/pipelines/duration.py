"""About how long a run takes: its pieces are timed on this machine, on numbers made up in the shapes of the
model, and counted."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from srcr.data.sampling import sampling_rows
from srcr.engine.memory import BATCH_TOKENS
from srcr.models.checkpoint import OpenModel
from srcr.models.topology import LinearGroup, Topology
from srcr.numerics.hessian import LayerStatistics
from srcr.numerics.sparsity import parse_structure
from srcr.plans.plan import LayerPlan
from srcr.plans.recovery import RecoverySpec
from srcr.plans.specs import SolverSpec
from srcr.solver.problem import LayerProblem
from srcr.solver.solve import solve
from srcr.transforms.fewer_experts import CHOSEN_KEYS
from srcr.transforms.smaller import text_config

#: A linear is timed by so many of its rows and columns at most, once the code has run on so many.
TIMED, WARM = 1024, 128
#: What a forward pass takes as a multiple of its products: norms, activations, copies (measured).
FORWARD = 1.7
#: What a training step takes as a multiple of a forward pass: the teacher's, the student's, backwards, and
#: what moves the numbers behind the codes (measured).
STEP = 10.0
#: Operations of a layer on a token beside its products, each at least as long as a small one takes.
OPERATIONS = 150
#: The share of the search text that a candidate is taken to be measured on: most are given up early.
MEASURED = 0.5
#: Bytes a second of what is read, hashed, coded, written and read back; and seconds that the checks of a
#: result take beside.
BYTES, CHECKS = 30e6, 3.0


@dataclass(frozen=True, eq=False)
class Stopwatch:
    """Times pieces of work for a model that is run in a precision on a ``device``."""

    opened: OpenModel
    device: torch.device
    running: torch.dtype

    @property
    def topology(self) -> Topology:
        """What the model is made of."""
        return self.opened.topology

    def forward(self, tokens: int, length: int) -> float:
        """Seconds of a pass of so many tokens, in rows of a ``length``, through the blocks."""
        return FORWARD * (self._linear_flops(tokens) + self._attention(tokens, length)) * self.flop

    def predictions(self, tokens: int, length: int) -> float:
        """Seconds of a pass through the blocks and the head."""
        head = 2 * tokens * self.opened.vocabulary * self._hidden
        return self.forward(tokens, length) + head * self.flop

    def moments(self, tokens: float) -> float:
        """Seconds of the second moments of all groups' inputs over so many tokens."""
        groups = self.topology.groups()
        flops = sum(
            2 * tokens * self._share(group) * self.topology.shapes[group.names[0]][1] ** 2
            for group in groups
        )
        return flops * self.flop

    def solving(self, plans: Mapping[str, LayerPlan], spec: SolverSpec, dense: bool) -> float:
        """Seconds of solving every group that is planned; ``dense``: with targets by the dense model."""
        known: dict[object, float] = {}
        total = 0.0
        for group in self.topology.groups():
            planned = {name: plans[name] for name in group.names if name in plans}
            if all(plan.prune is None and plan.quant is None for plan in planned.values()):
                continue
            shapes = tuple(self.topology.shapes[name] for name in planned)
            kind = shapes, *((plan.prune is None, plan.quant is None) for plan in planned.values())
            if kind not in known:
                self._solve(planned, spec, dense, WARM)
                known[kind] = self._solve(planned, spec, dense, TIMED)
            total += known[kind]
        return total

    def writing(self, samples: int, length: int) -> float:
        """Seconds of so many rows that the model writes itself."""
        rows = min(samples, sampling_rows(self.opened.config, length, self.running))
        steps = length * math.ceil(samples / rows)
        layers = len(self.topology.blocks)
        flops = self._linear_flops(1) + 2 * self.opened.vocabulary * self._hidden
        products = samples * length * flops * self._flop_seconds(rows)
        layer = OPERATIONS * self._operation + self._attended(rows, length // 2)
        return products + steps * layers * layer

    @cached_property
    def flop(self) -> float:
        """Seconds of a floating-point operation in a product of many tokens."""
        return self._flop_seconds(BATCH_TOKENS)

    def _flop_seconds(self, tokens: int) -> float:
        rows, cols = (
            min(TIMED, side) for side in max(self.topology.shapes.values(), key=math.prod)
        )
        x, weight = self._ones(tokens, cols), self._ones(cols, rows)
        return self._seconds(lambda: x @ weight) / (2 * tokens * rows * cols)

    @cached_property
    def _operation(self) -> float:
        """Seconds of a small operation."""
        x = self._ones(16)
        return self._seconds(lambda: [x + x for _ in range(100)][-1]) / 100

    def _attended(self, rows: int, positions: int) -> float:
        """Seconds of a layer's attention from a token of each of so many rows to so many before it."""
        config = text_config(self.opened)
        heads = getattr(config, "num_attention_heads", None) or 0
        if not heads or not positions:
            return 0.0
        shared = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        query = self._ones(rows, heads, 1, width)
        keys = self._ones(rows, shared, positions, width)
        return self._seconds(
            lambda: functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
        )

    def _ones(self, *shape: int) -> Tensor:
        return torch.ones(*shape, device=self.device, dtype=self.running)

    def _seconds(self, work: Callable[[], Tensor]) -> float:
        """The less of two times that some work takes, after a first."""
        times = []
        for _ in range(3):
            started = time.perf_counter()
            float(work().flatten()[0])  # waits for the device
            times.append(time.perf_counter() - started)
        return min(times[1:])

    def _solve(
        self, plans: Mapping[str, LayerPlan], spec: SolverSpec, dense: bool, most: int
    ) -> float:
        """Seconds of solving linears, by at most so many rows and columns of them."""
        shapes = {name: self.topology.shapes[name] for name in plans}
        width = next(iter(shapes.values()))[1]
        cols = min(width, max(1, most // _unit(plans)) * _unit(plans))
        generator = torch.Generator().manual_seed(0)

        def random(rows: int) -> Tensor:
            return torch.randn(rows, cols, generator=generator).to(self.device)

        weights = {name: random(min(rows, most)) for name, (rows, _) in shapes.items()}
        x = random(2 * cols)
        hessian = x.T @ x
        cross = {name: W @ hessian for name, W in weights.items()} if dense else None
        statistics = LayerStatistics(hessian, cross, hessian.clone() if dense else None)
        problem = LayerProblem(weights, plans, statistics, spec, self.opened.dtype)
        started = time.perf_counter()
        solve(problem)
        taken = time.perf_counter() - started
        rows = sum(rows for rows, _ in shapes.values())
        timed_rows = sum(len(W) for W in weights.values())
        return taken * (rows + width) * width**2 / ((timed_rows + cols) * cols**2)

    @property
    def _hidden(self) -> int:
        return self.topology.shapes[self.topology.blocks[0].linears()[0]][1]

    def _share(self, group: LinearGroup) -> float:
        """The share of all tokens that a group is given."""
        if not self.topology.routed(group.names[0]):
            return 1.0
        config = text_config(self.opened).to_dict()
        chosen = next((config[key] for key in CHOSEN_KEYS if config.get(key)), 1)
        return min(1.0, chosen / max(self.topology.experts.values()))

    def _linear_flops(self, tokens: float) -> float:
        """Of a pass of so many tokens through all linears."""
        return sum(
            2 * tokens * self._share(group) * math.prod(self.topology.shapes[name])
            for group in self.topology.groups()
            for name in group.names
        )

    def _attention(self, tokens: float, length: int) -> float:
        return 4 * tokens * length * self._hidden * len(self.topology.blocks)


def _unit(plans: Mapping[str, LayerPlan]) -> int:
    """What a number of columns has to be a multiple of: of groups that share a scale, and of N:M."""
    unit = 1
    for plan in plans.values():
        if plan.quant is not None and isinstance(plan.quant.group_size, int):
            unit = math.lcm(unit, max(1, plan.quant.group_size))
        pattern = parse_structure(plan.prune.mask_structure) if plan.prune else None
        unit = math.lcm(unit, pattern[1] if pattern else 1)
    return unit


def compression_seconds(
    watch: Stopwatch,
    plans: Mapping[str, LayerPlan],
    spec: SolverSpec,
    batches: Sequence[Tensor],
    dense: int,
) -> float:
    """Seconds of compressing all blocks by token ids [n, len] of each batch, on ``dense`` of which the dense
    model runs as well."""
    tokens, length = sum(ids.numel() for ids in batches), max(ids.shape[1] for ids in batches)
    seen = int(tokens * (1 + dense / len(batches)))
    walking = watch.forward(seen, length) + watch.moments(seen)
    return walking + watch.solving(plans, spec, bool(dense))


def files_seconds(read: int, written: int) -> float:
    """Seconds of reading and checking so many bytes of weights, and of writing so many and checking them."""
    return (read + 2 * written) / BYTES + CHECKS


def training_seconds(watch: Stopwatch, steps: int, tokens: int, length: int) -> float:
    """Seconds of so many steps of training, of so many tokens each."""
    return steps * STEP * watch.predictions(tokens, length)


def recovery_seconds(watch: Stopwatch, spec: RecoverySpec, length: int) -> float:
    """Seconds of a training on rows of a ``length``."""
    blocks = 0.0
    if spec.stage != "distill":
        tokens = spec.block_steps * spec.batch * length
        blocks = STEP * watch.forward(tokens, length)
    if spec.stage == "blockwise":
        return blocks
    if spec.minutes is not None:
        return blocks + 60 * spec.minutes
    steps = spec.steps or 0
    return blocks + training_seconds(watch, steps, spec.batch * length, length)


@dataclass(frozen=True)
class SearchCounts:
    """What a search does: ``levels`` that every group is solved at, ``candidates`` measured on so many
    ``tokens`` each, and ``finalists`` compressed again and measured on so many ``final_tokens``."""

    levels: int
    candidates: int
    tokens: int
    finalists: int
    final_tokens: int


def search_seconds(
    watch: Stopwatch, counts: SearchCounts, solving: float, compressing: float, length: int
) -> float:
    """Seconds of a search on rows of a ``length``, where all groups take ``solving`` at a level, and a
    compression ``compressing``."""
    measured = MEASURED * counts.candidates * watch.predictions(counts.tokens, length)
    final = compressing + 2 * watch.predictions(counts.final_tokens, length)
    return counts.levels * solving + measured + counts.finalists * final
