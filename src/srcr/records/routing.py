"""How many tokens of the calibration data each expert was given."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from srcr.records.run import LayerRecord

#: Experts that are named at most.
NAMED = 3


def expert_tokens(layers: Sequence[LayerRecord]) -> dict[str, int]:
    """Tokens by the name of the expert, in the order they run; empty for a model without experts."""
    return {
        layer.name.rpartition(".")[0]: layer.tokens for layer in layers if layer.tokens is not None
    }


@dataclass(frozen=True)
class ExpertLoad:
    """The tokens of the calibration data that the experts of a ``module`` were given: least, median, most;
    and how many experts were given none."""

    module: str
    experts: int
    least: int
    median: float
    most: int
    starved: int


def expert_loads(layers: Sequence[LayerRecord]) -> list[ExpertLoad]:
    """The load of every module of experts, in the order they run."""
    counts: dict[str, list[int]] = {}
    for name, tokens in expert_tokens(layers).items():
        counts.setdefault(name.rpartition(".")[0], []).append(tokens)
    return [
        ExpertLoad(module, len(n), min(n), median(n), max(n), n.count(0))
        for module, n in counts.items()
    ]


def routing_notes(layers: Sequence[LayerRecord]) -> tuple[str, ...]:
    """What a run says of its experts: how many tokens they were given, and which were given none."""
    tokens = expert_tokens(layers)
    if not tokens:
        return ()
    counts = sorted(tokens.values())
    notes = [
        f"experts were given {counts[0]} to {counts[-1]} tokens of the calibration data, {median(counts):g} "
        f"in the median of {len(counts)}"
    ]
    starved = [name for name, count in tokens.items() if count == 0]
    if starved:
        more = f" and {len(starved) - NAMED} more" if len(starved) > NAMED else ""
        notes.append(
            f"{len(starved)} of {len(tokens)} experts were given no token of the calibration data and are "
            f"compressed by what their layer is given: {', '.join(starved[:NAMED])}{more}; more or other "
            "calibration text may reach them"
        )
    return tuple(notes)
