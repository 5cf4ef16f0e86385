"""What transformers does with a model's weights while it loads them.

Its classes initialise every module that is not marked as loaded; tried on a copy without data.
"""

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def needs_weights(model: Any, linears: Iterable[str]) -> bool:
    """Whether transformers asks the ``linears`` for their weights while it loads ``model``, even where those
    are stored as packed codes: the class initialises them itself (Falcon, GPT-BigCode, nanochat)."""
    empty = _without_data(model)
    for name in linears:
        del empty.get_submodule(name)._parameters["weight"]
    try:
        empty.initialize_weights()
    except AttributeError:
        return True
    return False


def changes_weights(model: Any) -> bool:
    """Whether transformers changes weights of ``model`` that it has loaded (Youtu's row for padding)."""
    empty = _without_data(model)
    for parameter in empty.parameters():
        parameter._is_hf_initialized = True
    writes = _Writes(empty)
    with writes:
        empty.initialize_weights()
    return writes.any


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether anything is written to the parameters of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # A tensor's .data and its views share its storage.
        self._storages = {p.untyped_storage()._cdata for p in model.parameters()}
        self.any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = args[0] if args and func._schema.is_mutable else None
        if isinstance(written, Tensor) and written.untyped_storage()._cdata in self._storages:
            self.any = True
        return func(*args, **(kwargs or {}))


def _without_data(model: Any) -> Any:
    """A copy whose parameters have shapes only, and of which nothing is marked as loaded."""
    shapes: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), False) for p in model.parameters()
    }
    empty = copy.deepcopy(model, shapes)
    for module in empty.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    return empty
