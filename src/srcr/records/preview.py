"""What a command would come to, before it is run: what ``--dry-run`` prints."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preview:
    """Estimates from names, shapes and settings; nothing of the weights was read. ``tcr``, ``sparsity`` and
    ``bits`` as in :class:`srcr.records.run.Rates` (None: the search decides); ``stored_bytes``: the weight
    files; ``loaded_bytes``: their tensors, as an engine that keeps codes packed holds them (None: the format
    has none); ``memory_bytes``: what the process takes at least, of ``free_memory_bytes``;
    ``disk_bytes``: what the run writes at its most, of ``free_disk_bytes``; ``group_sizes``: columns that
    share a scale (-1: the whole row), and how many layers have them; ``text``: what is asked for;
    ``notes``: what will be said aloud; ``seconds``: about how long the run takes, by pieces of it that
    were timed on this machine."""

    command: str
    model: str
    format: str
    base_bytes: int
    stored_bytes: int | None
    loaded_bytes: int | None
    memory_bytes: int
    free_memory_bytes: int
    disk_bytes: int
    free_disk_bytes: int
    text: str
    tcr: float | None = None
    sparsity: float | None = None
    bits: float | None = None
    group_sizes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float | None = None
