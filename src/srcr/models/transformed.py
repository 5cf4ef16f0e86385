"""An overlay on a weight source: changed tensors, new ones, ones that are gone, and another config."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from srcr.errors import InputError
from srcr.models.source import WeightSource

#: Reads a tensor of the source below by its name: its numbers, or its shape alone (on the device "meta").
Read = Callable[[str], Tensor]
#: Makes a tensor of those below. What else it uses has to follow them: ``read(name) * scale.to(read(name))``.
Change = Callable[[Read], Tensor]


class TransformedSource:
    """A :class:`~srcr.models.source.WeightSource` that shows another one, transformed.

    ``changes`` makes tensors by name, each by a function of what reads those of ``base``; a name that
    ``base`` lacks is new. ``removed`` names are gone. ``config`` holds keys of config.json that differ.
    Nothing is computed before it is read, nothing is kept, and a shape costs no data.

    >>> from srcr.models.checkpoint import open_model
    >>> base = open_model("bundled").source
    >>> doubled = TransformedSource(base, {"model.norm.weight": lambda read: 2 * read("model.norm.weight")})
    >>> bool((doubled.get("model.norm.weight") == 2 * base.get("model.norm.weight")).all())
    True
    """

    def __init__(
        self,
        base: WeightSource,
        changes: Mapping[str, Change],
        removed: Collection[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.base = base
        self._changes = dict(changes)
        self._removed = frozenset(removed) - self._changes.keys()
        self._config = dict(config or {})
        self.config: Any = _changed_config(base.config, self._config)

    def config_dict(self) -> dict[str, Any]:
        """``config.json`` below, with the keys that differ."""
        return self.base.config_dict() | self._config

    def names(self) -> Sequence[str]:
        """Every name that is not removed, new ones last."""
        below = dict.fromkeys(self.base.names())
        names = [name for name in below if name not in self._removed]
        return names + [name for name in self._changes if name not in below]

    def meta(self, name: str) -> Tensor:
        """Shape and precision; a changed tensor is made from those without data."""
        return self._make(name, self.base.meta)

    def get(self, name: str) -> Tensor:
        """A tensor, changed where it is to be."""
        return self._make(name, self.base.get)

    def _make(self, name: str, read: Read) -> Tensor:
        if name in self._removed:
            raise InputError(f"the transformed weights have no tensor {name!r}: it was removed")
        return self._changes[name](read) if name in self._changes else read(name)


def _changed_config(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a transformers config with some keys changed."""
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(changed, key, value)
    return changed
