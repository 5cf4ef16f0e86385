"""evaluate(): the base and its compressed versions, in step, over the same text, tasks and prompts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from srcr.data.sampling import OnProgress
from srcr.data.sources import evaluation_request
from srcr.data.specs import EvaluationText, Source, check_text
from srcr.data.token_ids import check_tokens
from srcr.data.tokens import Tokens
from srcr.environment import select_device, versions
from srcr.errors import InputError
from srcr.metrics import retention
from srcr.metrics.divergence import measure_divergence, plan_passes
from srcr.metrics.harness import ItemSelection
from srcr.metrics.retention import PairedScores, item_scores, task_score
from srcr.metrics.semantic import continue_prompts, load_prompts, prepare, semantic_consistency
from srcr.metrics.specs import SemanticSpec
from srcr.metrics.speed import SpeedSpec, measure_speed
from srcr.metrics.tasks import Task, TaskResult, TaskSpec, resolve_tasks, run_tasks
from srcr.models.checkpoint import ModelLike, OpenModel
from srcr.numerics.tensors import dtype_name
from srcr.pipelines.candidates import Candidate, open_candidates
from srcr.pipelines.opening import TextModel, load_text, open_with_bar
from srcr.pipelines.options import RunOptions
from srcr.pipelines.progress import console, say, stage
from srcr.pipelines.refusals import check_order, check_run
from srcr.records.card import labels
from srcr.records.evaluation import Divergence, Evaluation, Semantic, Speed
from srcr.records.run import INCLUDES


@dataclass(frozen=True, eq=False)
class _Comparison:
    """The ``base`` in float32 on its device and the candidates beside it, measured by the same options."""

    opened: OpenModel
    base: Any
    candidates: Sequence[Candidate]
    options: RunOptions

    @cached_property
    def labels(self) -> list[str]:
        """A name for each candidate."""
        return labels([candidate.name for candidate in self.candidates])

    @property
    def writer(self) -> TextModel:
        """The base, where it writes text."""
        return TextModel(self.opened, self.base.device.type, self.base)

    @property
    def models(self) -> list[Any]:
        """The candidates' models."""
        return [candidate.model for candidate in self.candidates]

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.options.seed or 0


@torch.no_grad()
def evaluate(
    base: ModelLike,
    compressed: Sequence[ModelLike],
    text: EvaluationText | Tokens | Source = EvaluationText(),
    tasks: TaskSpec | None = None,
    semantic: SemanticSpec | None = None,
    options: RunOptions = RunOptions(),
    speed: SpeedSpec | None = None,
) -> list[Evaluation]:
    """What each compressed model kept of ``base``: rates and divergence, and where asked for tasks (with Sr
    and SrCr), semantic consistency and ``speed``. Each model is a folder, a hub id, "bundled", a transformers
    model (alone or with its tokenizer), or an open model; the text as calibration's of
    :func:`srcr.compress`. Everything is computed in float32; the base runs once for all.

    Raises:
        InputError: a model cannot be loaded, its vocabulary differs from the base's, or the text, a task
            or a scorer cannot be used.

    >>> evaluate("bundled", ["small"])[0].divergence.top1_agreement.value > 0.9
    True
    """
    started = time.monotonic()
    check_run(options)
    device = select_device(options.device)
    if not compressed:
        raise InputError("no compressed model was given")
    source = text if isinstance(text, Tokens) else EvaluationText.of(text)
    if isinstance(source, EvaluationText):
        check_text(source)
    chosen = resolve_tasks(tasks.names) if tasks else None
    check_order(base, compressed, "evaluate")
    opened = open_with_bar(base, options)
    _check_tokenizer(tasks, opened)
    reference, candidates = open_candidates(opened, compressed, device, options.quiet)
    comparison = _Comparison(opened, reference, candidates, options)
    tokens = _text(source, comparison)
    _warn_of_calibration(tokens, candidates)
    prompts = source if isinstance(source, Tokens) else source.source
    semantics = None if semantic is None else _semantics(semantic, prompts, comparison)
    divergences = _divergences(tokens, comparison)
    scores: list[dict[str, tuple[str, PairedScores]]] = [{} for _ in candidates]
    if tasks is not None and chosen is not None:
        selection = ItemSelection(tasks.limit, tasks.part, comparison.seed, tasks.chat)
        scores = _task_scores(chosen, selection, comparison)
    speeds = None if speed is None else _speeds(speed, tokens, comparison)
    seconds = round(time.monotonic() - started, 3)
    return [
        replace(
            _evaluation(candidate, divergences[i], scores[i]),
            speed=None if speeds is None else speeds[i],
            base=opened.name,
            semantic=None if semantics is None else semantics[i],
            text=tokens.record(rows=False),
            dtype=dtype_name(reference.dtype),
            seconds=seconds,
        )
        for i, candidate in enumerate(candidates)
    ]


def _check_tokenizer(tasks: TaskSpec | None, opened: OpenModel) -> None:
    """Refuse tasks for a model without a tokenizer.

    Raises:
        InputError: names the model.
    """
    if tasks is not None and opened.tokenizer is None:
        raise InputError(
            f"tasks are text, but {opened.name} has no tokenizer: measure without --tasks"
        )


def _evaluation(
    candidate: Candidate, divergence: Divergence, scores: dict[str, tuple[str, PairedScores]]
) -> Evaluation:
    """The figures of a candidate, Sr and SrCr by its scores on the tasks."""
    pairs = {name: pair for name, (_, pair) in scores.items()}
    sr = retention.semantic_retention(pairs)
    srcr = None
    if sr is not None:
        srcr = retention.srcr(sr, candidate.rates.sparsity, candidate.rates.bits)
    return Evaluation(
        base="",
        compressed=candidate.name,
        plan_fingerprint=candidate.plan_fingerprint,
        rates=candidate.rates,
        divergence=divergence,
        tasks={name: task_score(pair, metric) for name, (metric, pair) in scores.items()},
        sr=None if sr is None else sr.value,
        sr_ci95=None if sr is None else sr.ci95,
        srcr=None if srcr is None else srcr.value,
        srcr_ci95=None if srcr is None else srcr.ci95,
        items={name: item_scores(pair) for name, pair in pairs.items()},
        includes=INCLUDES,
        versions=versions(),
    )


def _text(text: EvaluationText | Tokens, comparison: _Comparison) -> Tokens:
    """The text to compare on, checked, loaded or written by the base."""
    if isinstance(text, Tokens):
        tokens = check_tokens(text, comparison.opened)
    else:
        request = evaluation_request(text, comparison.seed)
        tokens = load_text(request, comparison.writer, "text", comparison.options)
    if tokens.input_ids.shape[0] < 2:
        raise InputError(
            f"{tokens.source}: one sequence gives no interval; evaluate on at least 2 (more --samples, more "
            "text, or a shorter --seq-len)"
        )
    return tokens


def _warn_of_calibration(tokens: Tokens, candidates: Sequence[Candidate]) -> None:
    """Say aloud which candidates know the text already."""
    rows = set(tokens.row_hashes())
    for candidate in candidates:
        if rows.intersection(candidate.calibration_rows):
            console().print(f"warning: {candidate.name} was calibrated on some of this text")


def _divergences(tokens: Tokens, comparison: _Comparison) -> list[Divergence]:
    """All models over the text, batch by batch."""
    names = ["base", *comparison.labels]
    passes = plan_passes([comparison.base, *comparison.models], tokens)
    steps = len(passes.batches) * len(names)
    with stage("evaluate", steps, comparison.options.quiet) as bar:
        return measure_divergence(
            comparison.base,
            comparison.models,
            tokens,
            lambda model: bar.note(names[model], advance=1),
            passes,
        )


def _speeds(spec: SpeedSpec, tokens: Tokens, comparison: _Comparison) -> list[Speed]:
    """Everyone in turn, round by round."""
    with stage("speed", spec.rounds, comparison.options.quiet) as bar:
        return measure_speed(
            comparison.base,
            comparison.models,
            tokens.input_ids,
            spec,
            lambda done: bar.reach(done, f"round {done} of {spec.rounds}"),
        )


def _task_scores(
    chosen: Sequence[Task], selection: ItemSelection, comparison: _Comparison
) -> list[dict[str, tuple[str, PairedScores]]]:
    """For every candidate, the metric and both models' scores on each task; the base runs once."""
    names = ["base", *comparison.labels]
    results: list[dict[str, TaskResult]] = []
    with stage("tasks", len(names), comparison.options.quiet) as bar:
        for i, model in enumerate([comparison.base, *comparison.models]):

            def watch(done: float, what: str, i: int = i) -> None:
                bar.reach(i + done / len(chosen), f"{names[i]}: {what}")

            tokenizer = comparison.opened.tokenizer
            results.append(run_tasks(chosen, model, tokenizer, selection, watch))
            bar.reach(i + 1, names[i])
    base, *others = results
    return [
        {name: (result.metric, _paired(result, other[name])) for name, result in base.items()}
        for other in others
    ]


def _paired(base: TaskResult, compressed: TaskResult) -> PairedScores:
    """Both models' scores on the items of a task."""
    return PairedScores(
        np.array(base.correct, dtype=np.float64),
        np.array(compressed.correct, dtype=np.float64),
        base.chance,
    )


def _semantics(spec: SemanticSpec, source: Any, comparison: _Comparison) -> list[Semantic]:
    """What every candidate makes of the prompts, compared with what the base makes of them."""
    opened, base, quiet = comparison.opened, comparison.base, comparison.options.quiet
    with stage("semantic", 2 + len(comparison.models), quiet) as bar:

        def watch(start: int, what: str) -> OnProgress:
            return lambda done, total: bar.reach(start + done / total, what)

        prompts = load_prompts(
            spec, source, comparison.writer, comparison.seed, watch(0, "prompts")
        )
        for note in prompts.notes:
            say(note, quiet)
        expected = prepare(base, opened.tokenizer, prompts, spec, watch(1, "base"))
        results = []
        for i, (label, candidate) in enumerate(
            zip(comparison.labels, comparison.models, strict=True), 2
        ):
            texts = continue_prompts(expected, candidate, watch(i, label))
            results.append(semantic_consistency(expected, texts))
        bar.reach(2 + len(results), f"scored by {expected.scorer.name}")
    return results
