"""How many tokens of the calibration data each expert was given."""

from collections.abc import Sequence
from statistics import median

from srcr.records.run import LayerRecord

#: Experts that are named at most.
NAMED = 3


def expert_tokens(layers: Sequence[LayerRecord]) -> dict[str, int]:
    """Tokens by the name of the expert, in the order they run; empty for a model without experts."""
    return {
        layer.name.rpartition(".")[0]: layer.tokens for layer in layers if layer.tokens is not None
    }


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
