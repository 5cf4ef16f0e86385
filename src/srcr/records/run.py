"""The record of a compression, ``srcr.json``."""

from dataclasses import dataclass, field
from typing import Literal

from srcr.plans.structures import NAMES
from srcr.records.base_card import BaseCard
from srcr.records.recovery import RecoveryRecord
from srcr.records.text import TextRecord

#: Libraries that open a checkpoint as a transformers model.
Loader = Literal["transformers", "srcr"]

#: What each count includes, for people to read beside it.
INCLUDES = {
    "tcr": "linear layers of the decoder blocks against 16 bits; no scales, zero-points, embeddings, head",
    "entropy_bits": "bits a weight of the same layers if their codes were ideally entropy-coded; no scales",
    "base_bytes": "weight files of the original on disk: everything in them",
    "stored_bytes": "weight files on disk: codes, scales, zero-points, embeddings, head",
    "loaded_bytes": "weights that the named engine keeps in memory, embeddings and head included",
}


@dataclass(frozen=True)
class Rates:
    """How much smaller: see docs/measures.md for what each byte count includes."""

    sparsity: float
    bits: float
    tcr: float
    zeros: float
    base_bytes: int
    stored_bytes: int
    loaded_bytes: int
    engine: str
    source: str
    entropy_bits: float | None = None


@dataclass(frozen=True)
class LoadedBytes:
    """Bytes that ``engine`` keeps in memory for a checkpoint's weights."""

    n_bytes: int
    engine: str


@dataclass(frozen=True)
class LayerRecord:
    """What happened to a layer: sparsity of its mask, bits, TCr, counted zeros, the entropy of its codes
    in bits a weight, and its output error (relative, squared); of an expert's, how many ``tokens`` of the
    calibration data were routed to it."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    bits: int
    tcr: float
    zeros: float
    entropy_bits: float
    error: float
    tokens: int | None = None


@dataclass(frozen=True)
class StructureRecord:
    """What was removed whole: of ``before`` elements of a ``kind`` ("channels", "heads" and "experts" of
    every layer, "layers") ``after`` are left. Of layers: which were ``removed``, in the order chosen, and
    whether what they did was ``folded`` into those before. Of ``experts``: which went, by the module that
    held them. Else the output ``errors`` (relative, squared) of every block."""

    kind: str
    before: int
    after: int
    removed: tuple[int, ...] | None = None
    folded: bool | None = None
    errors: tuple[float, ...] | None = None
    experts: dict[str, tuple[int, ...]] | None = None

    @property
    def name(self) -> str:
        """What people call the elements."""
        return NAMES.get(self.kind, self.kind)

    @property
    def summary(self) -> str:
        """How many are left, and of layers which are not."""
        text = f"{self.after} of {self.before} left"
        if self.removed is None:
            return text
        gone = ", ".join(map(str, sorted(self.removed)))
        folded = ", what they did folded into those before" if self.folded else ""
        return f"{text} (without {gone}{folded})"


@dataclass(frozen=True)
class Verification:
    """Logits of the written checkpoint beside those of the model as it was compressed, over a row of so many
    ``tokens``: their relative ``difference`` in norm and what it may be; ``loaded_by``: transformers, or
    block by block where the whole model would take more memory than the run did; ``precision``: what both
    ran in."""

    tokens: int
    difference: float
    tolerance: float
    loaded_by: str
    precision: str


@dataclass(frozen=True)
class Probe:
    """What the compressed model predicts, for engines to be compared with: behind each of the token ``ids``
    its ``top1`` token and the logarithm of that one's probability."""

    ids: tuple[int, ...]
    top1: tuple[int, ...]
    log_probabilities: tuple[float, ...]


@dataclass(frozen=True)
class RunSummary:
    """What is read of an ``srcr.json`` that another version of srcr may have written."""

    rates: Rates
    plan_fingerprint: str | None = None
    calibration: TextRecord | None = None


@dataclass(frozen=True)
class RunRecord:
    """Everything needed to understand and repeat a run; written as ``srcr.json``. ``compute``: which
    implementations it computed by, as :func:`srcr.numerics.paths.compute_paths` names them; ``embeddings``:
    what happened to the input embedding and the output head, where they are quantized (their error is that
    of the weights); ``loader``: which library opens the checkpoint as a transformers model; ``structures``:
    what was removed whole, before anything else; ``recoveries``: how it was trained, in order; ``probe``:
    what it predicts for a few tokens; ``base_card``: what the original's own card says of licence and
    language."""

    base: str
    base_sha256: str
    command: str
    format: str
    rates: Rates
    plan_fingerprint: str
    calibration: TextRecord
    layers: tuple[LayerRecord, ...]
    versions: dict[str, str]
    seconds: float
    peak_memory_bytes: int
    verification: Verification | None = None
    notes: tuple[str, ...] = ()
    compute: dict[str, str] = field(default_factory=dict)
    embeddings: tuple[LayerRecord, ...] | None = None
    loader: Loader = "transformers"
    structures: tuple[StructureRecord, ...] | None = None
    recoveries: tuple[RecoveryRecord, ...] | None = None
    probe: Probe | None = None
    base_card: BaseCard | None = None
