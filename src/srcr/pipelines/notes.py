"""What should be said aloud of a model before it is compressed, and stands in the record."""

from srcr.models.checkpoint import OpenModel
from srcr.models.config import is_quantized
from srcr.plans.plan import CompressionPlan


def left_alone(opened: OpenModel, plan: CompressionPlan) -> str | None:
    """Which linears and stacks of matrices stay as they are, or None where there are none but the head."""
    planned = {layer.name for layer in plan.layers if layer.prune or layer.quant}
    linears = [name for name in opened.topology.linears() if name not in planned]
    notes = []
    if linears:
        notes.append(
            f"{len(linears)} of {len(opened.topology.shapes)} linear layers of the decoder blocks, "
            f"{linears[0]} first (they count as 16 bits in TCr)"
        )
    if others := [*opened.topology.untouched, *opened.topology.stacks]:
        notes.append(
            f"{len(others)} weights outside the decoder blocks, or used otherwise than by linear layers, "
            f"{others[0]} first"
        )
    return f"left as they are: {'; '.join(notes)}" if notes else None


def left_out(opened: OpenModel) -> str | None:
    """Which tensors of the files the model has no place for, or None where there are none."""
    if not opened.leftovers:
        return None
    return (
        f"left out, as transformers does: {len(opened.leftovers)} tensors of the files that "
        f"{opened.architecture} has no place for, {opened.leftovers[0]} first"
    )


def quantized_already(opened: OpenModel) -> str | None:
    """What is compressed of a model that another tool has quantized, or None of any other."""
    if opened.folder is None or not is_quantized(opened.folder):
        return None
    return (
        f"{opened.name} is quantized already: its dequantized weights are compressed, without what quantizes "
        "its activations"
    )
