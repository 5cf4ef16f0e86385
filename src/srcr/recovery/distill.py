"""End-to-end distillation: steps, what held-out text says of them, the best state, and how to go on later."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from srcr.data.tokens import Tokens
from srcr.errors import InputError, NumericalError, SrcrError
from srcr.formats import native
from srcr.numerics.compressed import CompressedWeight
from srcr.records.recovery import TrainingPoint
from srcr.recovery.memory import OutOfMemoryError, out_of_memory_raised
from srcr.recovery.step import TOGETHER, Setting, held_out, optimizer_of, train_step
from srcr.serialize import from_dict, to_json

#: Steps whose time says how many fit into the minutes.
MEASURED = 3
#: How often held-out text is looked at: so many times, fewer where that took more than this share of the
#: time.
CHECKS, CHECK_SHARE = 20, 0.1
#: Looks, each worse than the one before, after which training stops.
PATIENCE = 5
#: What Adam keeps of each tensor from its first step on.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
#: Stands for a number of steps that is not known yet.
MANY = 1 << 20


@dataclass(frozen=True, eq=False)
class TrainedWeights:
    """What training came to: compressed weights, and norms and biases as they are stored, by name."""

    weights: Mapping[str, CompressedWeight]
    plain: Mapping[str, Tensor]


@dataclass
class State:
    """Where training stands. ``steps``: how many there will be (None: not known yet), ``checks``: how often
    the held-out text is looked at; ``curve``: what it said; ``losses``: those of the steps since; ``tokens``
    and ``seconds`` so far; ``stopped``: why it ended early; ``blocks``: which were changed before;
    ``together``: how many tokens go through the student at a time."""

    step: int = 0
    steps: int | None = None
    checks: int = CHECKS
    curve: list[TrainingPoint] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    blocks: list[bool] | None = None
    together: int = TOGETHER

    @property
    def due(self) -> bool:
        """Whether the held-out text is looked at after this step."""
        if self.steps is None:
            return False
        return self.step % math.ceil(self.steps / self.checks) == 0 or self.step == self.steps

    @property
    def best(self) -> TrainingPoint:
        """The look at which KL was lowest."""
        return min(self.curve, key=lambda point: point.kl)


#: Called after every step with the state; and after every look at the held-out text.
OnStep = Callable[[State], None]
OnCheck = Callable[["Distillation"], None]


class Distillation:
    """Distillation under way. ``held``: text that the best state is chosen by."""

    def __init__(self, setting: Setting, held: Tokens) -> None:
        self.setting = setting
        self.held = held
        steps = 0 if setting.spec.stage == "blockwise" else setting.spec.steps
        self.state = State(steps=steps)
        self.best: dict[str, Tensor] = {}
        self._optimizer = optimizer_of(setting.student, setting.spec)

    def run(self, on_step: OnStep, on_check: OnCheck) -> TrainedWeights:
        """Train to the end; the weights of the state that was best on the held-out text.

        Raises:
            NumericalError: the model's predictions are not finite before anything is trained.
        """
        state = self.state
        if not state.curve:
            self._check()
            on_check(self)
        while state.stopped is None and (state.steps is None or state.step < state.steps):
            self._step()
            if state.stopped is None and state.due and state.losses:
                self._check()
                on_check(self)
            on_step(state)
        return self._best()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that :meth:`restore` needs to go on exactly from here."""
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        state = torch.frombuffer(bytearray(to_json(self.state).encode()), dtype=torch.uint8)
        for number, tensor in enumerate(self._trained()):
            tensors[f"latent.{number}"] = tensor
            for key, value in self._optimizer.state[tensor].items():
                tensors[f"{key}.{number}"] = value
        return {**tensors, "state": state}

    def restore(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Go on from what :meth:`tensors` gave.

        Raises:
            InputError: it is damaged.
        """
        latents = [f"latent.{number}" for number in range(len(self._trained()))]
        if missing := [name for name in ("state", *latents) if name not in tensors]:
            raise InputError(f"{where} lacks {missing[0]}: use --overwrite to start afresh")
        text = tensors["state"].numpy().tobytes().decode()
        self.state = from_dict(State, json.loads(text), where)
        self.setting = replace(self.setting, together=self.state.together)
        self.best = {
            name.removeprefix("best."): tensor
            for name, tensor in tensors.items()
            if name.startswith("best.")
        }
        for number, latent in enumerate(self._trained()):
            latent.copy_(tensors[f"latent.{number}"])
            known = {key: tensors.get(f"{key}.{number}") for key in MOMENTS}
            if state_of := {k: t.to(latent.device) for k, t in known.items() if t is not None}:
                self._optimizer.state[latent] = state_of
        self.setting.student.write()

    def _trained(self) -> list[Tensor]:
        return [tensor for group in self._optimizer.param_groups for tensor in group["params"]]

    def _step(self) -> None:
        """A step; training stops where its loss is not finite."""
        state, started = self.state, time.monotonic()
        try:
            # Before their number is known, learning rates only rise.
            with out_of_memory_raised():
                loss = train_step(self.setting, self._optimizer, state.step, state.steps or MANY)
        except NumericalError as error:
            state.stopped = str(error)
            return
        except OutOfMemoryError as error:
            self._shrink(error)
            return
        state.step += 1
        state.losses.append(loss.mean)
        state.tokens += loss.tokens
        state.seconds += time.monotonic() - started
        if state.steps is None and state.step == MEASURED:
            self._plan_steps()

    def _shrink(self, error: OutOfMemoryError) -> None:
        """Let half as many tokens go through the student together: the step is made again.

        Raises:
            SrcrError: it was a single row already, or other processes wait for this one.
        """
        if self.setting.processes.count > 1:
            raise SrcrError("a step does not fit into memory: use a smaller --batch") from error
        self.setting.student.drop_gradients()
        together, longest = self.setting.together, int(self.setting.tokens.row_lengths.max())
        rows = min(self.setting.spec.batch, max(1, together // longest))
        if rows == 1:
            raise SrcrError(
                f"a sequence of {longest} tokens does not fit into memory: use shorter ones (--seq-len)"
            ) from error
        self.state.together = rows // 2 * longest
        self.setting = replace(self.setting, together=self.state.together)

    def _plan_steps(self) -> None:
        """How many steps fit into the minutes, by the time that the first ones took."""
        state, minutes = self.state, self.setting.spec.minutes
        assert minutes is not None
        check = state.curve[0].seconds
        left = 60 * minutes - check - state.seconds
        state.checks = max(2, min(CHECKS, int(CHECK_SHARE * left / max(check, 1e-9))))
        more = int((left - state.checks * check) * state.step / state.seconds)
        planned = state.checks, state.step + max(1, more)
        state.checks, state.steps = self.setting.processes.broadcast(planned)

    def _check(self) -> None:
        """Look at the held-out text; keep the state where it is the best so far."""
        state, started = self.state, time.monotonic()
        setting = self.setting
        kl, tokens = held_out(setting.student, setting.teacher, self.held, setting.processes)
        value = float(kl.sum() / tokens.sum())
        if not math.isfinite(value):
            if not state.curve:
                raise NumericalError("the predictions on the held-out text are not finite")
            state.stopped = f"the KL on held-out text is not finite after step {state.step}"
            return
        if not state.curve or value < state.best.kl:
            self.best = self._results()
        loss = float(np.mean(state.losses)) if state.losses else None
        seconds = round(time.monotonic() - started, 3)
        state.curve.append(TrainingPoint(state.step, loss, value, seconds))
        state.losses = []
        last = [point.kl for point in state.curve[-PATIENCE - 1 :]]
        rises = len(last) > PATIENCE and all(a < b for a, b in pairwise(last))
        # In the first half high learning rates may cost before they pay.
        if rises and 2 * state.step > (state.steps or 0):
            state.stopped = f"the KL on held-out text rose from look to look, {PATIENCE} times"

    def _results(self) -> dict[str, Tensor]:
        student = self.setting.student
        return {**native.encode_all(student.results()), **student.plain_results()}

    def _best(self) -> TrainedWeights:
        student = self.setting.student
        weights = {
            name: native.decode_from(self.best, self.best.__getitem__, name)
            for name in student.latents
        }
        return TrainedWeights(weights, {name: self.best[name] for name in student.plain})
