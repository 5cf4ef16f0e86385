"""What a compressed model kept of its base; :func:`srcr.serialize.to_dict` gives the JSON of each type."""

from dataclasses import dataclass, field

from srcr.plans.plan import CompressionPlan
from srcr.records.estimate import Estimate, Interval
from srcr.records.run import Rates
from srcr.records.text import TextRecord
from srcr.serialize import NULLABLE


@dataclass(frozen=True)
class Histogram:
    """How many values lie below the first of the ``edges``, from each edge to the next, and from the last on:
    one more of ``counts`` than edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class KlEstimate:
    """Mean KL(base || compressed) in nats a token with its 95 % interval, its percentiles over tokens, and
    how many tokens have which KL."""

    value: float
    ci95: Interval
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    histogram: Histogram | None = None


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of both models, and compressed over base."""

    base: float
    compressed: float
    ratio: Estimate | None = None


@dataclass(frozen=True)
class Divergence:
    """The compressed model against the base, over ``n_tokens`` predicted positions (len - 1 a sequence).

    ``top1_agreement``: share of positions where both rank the same token first; ``flips``: share where
    exactly one of them ranks the text's own token first (after "Accuracy is Not All You Need",
    arXiv 2407.09141).
    """

    kl: KlEstimate
    top1_agreement: Estimate
    perplexity: Perplexity
    n_tokens: int
    flips: Estimate | None = None


@dataclass(frozen=True)
class Comparison:
    """A prompt, how each model goes on, and how similar that is (1: the same)."""

    prompt: str
    base: str
    compressed: str
    similarity: float


@dataclass(frozen=True)
class Semantic:
    """``consistency``: mean cosine of the two models' continuations; ``chance``: the same over
    continuations of different prompts; ``normalised``: (consistency - chance) / (1 - chance), None
    where all texts are alike; ``exact``: share of identical continuations; ``worst`` prompts first."""

    consistency: float
    ci95: Interval | None
    chance: float
    normalised: float | None
    normalised_ci95: Interval | None
    scorer: str
    n: int
    prompt_len: int | None = None
    max_new_tokens: int | None = None
    exact: float | None = None
    worst: tuple[Comparison, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class TaskScore:
    """A task's score on both models. ``retention`` is None where the base is at chance; the ``note`` says
    so."""

    base: float
    compressed: float
    chance: float
    n: int
    retention: float | None = field(default=None, metadata=NULLABLE)
    ci95: Interval | None = field(default=None, metadata=NULLABLE)
    p_value: float | None = None
    flips: float | None = None
    metric: str = ""
    note: str | None = None


@dataclass(frozen=True)
class ItemScores:
    """Scores of both models on the items of a task, in the same order."""

    base: tuple[float, ...]
    compressed: tuple[float, ...]


@dataclass(frozen=True)
class Throughput:
    """Tokens a second of both models, and compressed over base (above 1: faster)."""

    base: float
    compressed: float
    ratio: Estimate


@dataclass(frozen=True)
class Speed:
    """How fast both models read a prompt of ``prompt_len`` tokens (``prefill``) and write behind it
    (``decode``), a sequence at a time, in transformers, both dequantized to ``dtype``: what engines with
    kernels for codes make of the bits is not in it."""

    prefill: Throughput
    decode: Throughput
    prompt_len: int
    new_tokens: int
    rounds: int
    device: str
    threads: int
    dtype: str


@dataclass(frozen=True)
class Evaluation:
    """What ``srcr evaluate`` measured on a compressed model. ``dtype``: what both models ran in; ``plan``: of
    a search's finalist, which is not on disk any more; ``speed``: where it was asked for."""

    base: str
    compressed: str
    rates: Rates
    plan_fingerprint: str | None = field(default=None, metadata=NULLABLE)
    divergence: Divergence | None = field(default=None, metadata=NULLABLE)
    semantic: Semantic | None = field(default=None, metadata=NULLABLE)
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    sr: float | None = field(default=None, metadata=NULLABLE)
    sr_ci95: Interval | None = field(default=None, metadata=NULLABLE)
    srcr: float | None = field(default=None, metadata=NULLABLE)
    srcr_ci95: Interval | None = field(default=None, metadata=NULLABLE)
    items: dict[str, ItemScores] = field(default_factory=dict)
    text: TextRecord | None = None
    dtype: str | None = None
    includes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    command: str = ""
    plan: CompressionPlan | None = None
    speed: Speed | None = None
