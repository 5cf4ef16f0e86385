"""A checkpoint with what training came to, and the records of its layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from srcr.formats.checkpoint import Checkpoint, Tensors
from srcr.metrics.rates import count_zeros, entropy_bits
from srcr.numerics.compressed import CompressedWeight
from srcr.records.run import LayerRecord
from srcr.recovery.distill import TrainedWeights


@dataclass(frozen=True, eq=False)
class _ChangedTensors:
    """:class:`~srcr.formats.checkpoint.Tensors` of which some are others."""

    below: Tensors
    changed: Mapping[str, Tensor]

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.below.names())

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision."""
        return self.below.meta(name)

    def tensor(self, name: str) -> Tensor:
        """A tensor."""
        return self.changed[name] if name in self.changed else self.below.tensor(name)


def trained_checkpoint(checkpoint: Checkpoint, trained: TrainedWeights) -> Checkpoint:
    """The checkpoint with what training came to; what else is compressed, as embeddings, stays."""
    plain = {name: tensor.cpu() for name, tensor in trained.plain.items()}
    weights = {name: weight.cpu() for name, weight in trained.weights.items()}

    def read(name: str) -> CompressedWeight:
        return weights[name] if name in weights else checkpoint.read(name)

    return replace(checkpoint, tensors=_ChangedTensors(checkpoint.tensors, plain), read=read)


def measured_layers(layers: Sequence[LayerRecord], checkpoint: Checkpoint) -> list[LayerRecord]:
    """The records of layers with zeros and entropy as they are in a checkpoint; what else they say stays,
    such as the error that compression left."""
    return [_measured(layer, checkpoint) for layer in layers]


def _measured(layer: LayerRecord, checkpoint: Checkpoint) -> LayerRecord:
    """The record of a layer with zeros and entropy as they are now."""
    weight = checkpoint.read(layer.name)
    zeros = count_zeros([weight.dequantize().to(checkpoint.dtype)])
    entropy = layer.entropy_bits if weight.codes is None else entropy_bits(weight)
    return replace(layer, zeros=zeros, entropy_bits=entropy)
