"""Semantic consistency: does the compressed model still write what the base writes?

Both continue the same prompts greedily; a sentence-embedding model compares the continuations in pairs.
The cosine of two texts that have nothing to do with each other is not 0, so the chance level, the mean
over all pairs of different prompts, stands beside it and scales the normalised value.

    reference = prepare(base, tokenizer, load_prompts(spec, "self", opened), spec)
    result = semantic_consistency(reference, continue_prompts(reference, model))
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from srcr.data.sources import TextRequest, load_tokens
from srcr.data.token_ids import holds_ids
from srcr.data.tokens import LanguageModel, Tokens
from srcr.errors import InputError
from srcr.metrics.consistency import consistency_estimates
from srcr.metrics.continuations import continue_greedily, decode, stop_tokens
from srcr.metrics.embeddings import Scorer, embed_texts, load_scorer
from srcr.metrics.specs import SemanticSpec
from srcr.records.evaluation import Comparison, Semantic

Array = npt.NDArray[np.float64]

#: Pairs of continuations that are reported, those that are least alike.
WORST = 10


@dataclass(frozen=True, eq=False)
class Reference:
    """What every candidate is compared with, computed once: the base's continuations of ``prompts``
    and their embeddings [n, d + 1]."""

    prompts: Tokens
    max_new_tokens: int
    stop: tuple[int, ...]
    tokenizer: Any | None
    scorer: Scorer
    texts: tuple[str, ...]
    embeddings: Array


def load_prompts(
    spec: SemanticSpec,
    source: Any,
    model: LanguageModel,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokens:
    """The prompts of ``spec`` [n, prompt_len], from ``source`` where it names none: the first tokens of its
    rows, of those that are as long; fewer where there are fewer.

    Raises:
        InputError: the source cannot be used, or its rows are too few or too short.
    """
    source = source if spec.prompts is None else spec.prompts
    most = sys.maxsize if holds_ids(source) else spec.n  # rows that are too short are passed over
    request = TextRequest(source, None, spec.prompt_len, most, "evaluation", seed)
    tokens = load_tokens(request, model, on_progress)
    long = (tokens.row_lengths >= spec.prompt_len).nonzero()[:, 0].tolist()
    length = tokens.input_ids.shape[1]
    if not long:
        raise InputError(
            f"prompts of {spec.prompt_len} tokens were asked for, {tokens.source} and the model's context "
            f"allow {length}: set prompt_len to {length}, or give longer rows"
        )
    if len(long) < 2:
        raise InputError(
            f"{tokens.source} has one row of {spec.prompt_len} tokens: at least 2 prompts are needed"
        )
    return tokens.select(long[: spec.n]).crop(spec.prompt_len)


def prepare(
    base: Any,
    tokenizer: Any | None,
    prompts: Tokens,
    spec: SemanticSpec,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """Let the base continue the prompts, and embed what it wrote.

    Raises:
        InputError: the scorer cannot be loaded, or the continuations do not fit the model's context.
    """
    scorer = load_scorer(spec.scorer, base, tokenizer)
    stop = stop_tokens(base)
    ids = continue_greedily(base, prompts.input_ids, spec.max_new_tokens, stop, on_progress)
    texts = decode(ids, tokenizer)
    embeddings = embed_texts(scorer, texts)
    return Reference(
        prompts, spec.max_new_tokens, stop, tokenizer, scorer, tuple(texts), embeddings
    )


def continue_prompts(
    reference: Reference,
    model: Any,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """How a candidate continues the reference's prompts, ended by the base's end tokens.

    Raises:
        InputError: the continuations do not fit the model's context.
    """
    ids = continue_greedily(
        model, reference.prompts.input_ids, reference.max_new_tokens, reference.stop, on_progress
    )
    return decode(ids, reference.tokenizer)


def semantic_consistency(reference: Reference, texts: Sequence[str]) -> Semantic:
    """Compare a candidate's continuations with the base's, prompt by prompt.

    Identical texts are 1 alike by definition, and so are two empty ones; an empty text and one that
    is not are 0 alike.

    Raises:
        InputError: not one text a prompt, or fewer than two.
    """
    n = len(reference.texts)
    if len(texts) != n or n < 2:
        raise InputError(f"{len(texts)} continuations for {n} prompts: one each, and at least 2")
    embeddings = embed_texts(reference.scorer, texts)
    same = np.array([text == base for text, base in zip(texts, reference.texts, strict=True)])
    cosine = (reference.embeddings * embeddings).sum(1).clip(-1, 1)
    similarity = np.where(same, 1.0, cosine)
    consistency, chance, normalised = consistency_estimates(
        similarity, reference.embeddings, embeddings
    )
    worst = np.argsort(similarity, kind="stable")[:WORST]
    ids = reference.prompts.input_ids
    prompts = decode(ids[worst], reference.tokenizer)
    return Semantic(
        consistency=consistency.value,
        ci95=consistency.ci95,
        chance=chance,
        normalised=None if normalised is None else normalised.value,
        normalised_ci95=None if normalised is None else normalised.ci95,
        scorer=reference.scorer.name,
        n=n,
        prompt_len=ids.shape[1],
        max_new_tokens=reference.max_new_tokens,
        exact=float(same.mean()),
        worst=tuple(
            Comparison(prompt, reference.texts[i], texts[i], float(similarity[i]))
            for prompt, i in zip(prompts, worst.tolist(), strict=True)
        ),
        source=reference.prompts.source,
    )
