"""For tests, ours and others': tiny models of many families, and suites that a new method, format or family
must pass. A suite raises an AssertionError that names the fault."""

from srcr.testing.checkpoints import compressed_checkpoint
from srcr.testing.couplings import check_couplings
from srcr.testing.families import FAMILIES, save_tiny_model, tiny_model
from srcr.testing.formats import check_format
from srcr.testing.methods import check_pruner, check_quantizer

__all__ = [
    "FAMILIES",
    "check_couplings",
    "check_format",
    "check_pruner",
    "check_quantizer",
    "compressed_checkpoint",
    "save_tiny_model",
    "tiny_model",
]
