"""An output head of its own, for a model whose head is its input embedding."""

from srcr.models.source import WeightSource
from srcr.models.streaming import empty_model
from srcr.models.transformed import TransformedSource


def untie(source: WeightSource) -> TransformedSource:
    """The weights of ``source`` with an output head apart from the input embedding, so that either can be
    changed without the other; the model gives the same logits. Where they are apart already, nothing changes.

    >>> from srcr.models.checkpoint import open_model
    >>> opened = open_model("bundled")
    >>> opened.transformed(untie(opened.source)).topology.tied
    False
    """
    model = empty_model(source)
    embedding = model.get_input_embeddings().weight
    parameters = model.named_parameters(remove_duplicate=False)
    tied = [name for name, parameter in parameters if parameter is embedding]
    available = set(source.names())
    stored = next(name for name in tied if name in available)
    return TransformedSource(
        source,
        {name: lambda read: read(stored) for name in tied if name not in available},
        config={"tie_word_embeddings": False},
    )
