"""What a model's tensors are called in checkpoints, where transformers renames or stacks what it reads.

Asked of transformers' own conversions: tensors that are numbered go through them, and come out under the
names that it would save them by.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.models.experts import experts_of
from srcr.models.matrices import MatrixRef
from srcr.models.source import CheckpointSource
from srcr.models.validation import library_errors


def stored_places(model: Any) -> dict[str, MatrixRef]:
    """Where each tensor of a model with experts (taken apart) lies in checkpoints on the hub; empty for one
    without: its tensors go by their own names.

    Raises:
        InputError: transformers stores a tensor in a form that is not known.
    """
    if not experts_of(model):
        return {}
    places = _own_places(model)
    values, state = _numbered(places)
    return _find_places(values, _saved(model, state))


def _own_places(model: Any) -> dict[str, MatrixRef]:
    """Where each tensor lies in the model with its experts in stacks."""
    places = {name: MatrixRef(name) for name in model.state_dict()}
    for prefix, module in experts_of(model).items():
        for name, place in module.places().items():
            places[f"{prefix}.{name}"] = replace(place, parameter=f"{prefix}.{place.parameter}")
    return places


def _numbered(places: Mapping[str, MatrixRef]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Small tensors of numbers that are all different: those that stand for the model's by name, [2, 3] or
    [2] of experts and [6] of all else; and the parameters of the fused model that they lie in."""
    values: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    counts = Counter(place.parameter for place in places.values() if place.half in (None, 0))
    for number, (name, place) in enumerate(places.items()):
        shape = (6,) if place.index is None else (2,) if name.endswith(".bias") else (2, 3)
        size = math.prod(shape)
        values[name] = (6 * number + torch.arange(size, dtype=torch.float64)).view(shape)
        if place.index is None:
            state[place.parameter] = values[name]
            continue
        if place.parameter not in state:
            whole = place.stack_shape(shape, counts[place.parameter])
            state[place.parameter] = torch.zeros(whole, dtype=torch.float64)
        place.view(state[place.parameter]).copy_(values[name])
    return values, state


def _saved(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that transformers saves a state of the fused model as."""
    from transformers.core_model_loading import revert_weight_conversion

    # How it was loaded, which may be from packed codes, is not how it is stored.
    loaded_by = model.__dict__.pop("_weight_conversions", None)
    try:
        with library_errors(f"transformers does not say how it stores a {type(model).__name__}"):
            saved: dict[str, Tensor] = revert_weight_conversion(model, state)
    finally:
        if loaded_by is not None:
            model._weight_conversions = loaded_by
    return saved


def _find_places(values: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, MatrixRef]:
    """Where the saved tensors hold the numbers of each of the model's."""
    holders = {
        number: name for name, tensor in saved.items() for number in tensor.flatten().tolist()
    }
    places: dict[str, MatrixRef] = {}
    for name, numbers in values.items():
        holder = holders.get(float(numbers.flatten()[0]))
        place = None if holder is None else _place_in(holder, saved[holder], numbers)
        if place is None and numbers.shape != (6,):
            raise InputError(
                f"checkpoints of this architecture store {name} in a form that srcr does not know"
            )
        # Transformers loads by the model's own names, too.
        places[name] = place or MatrixRef(name)
    return places


def _place_in(name: str, tensor: Tensor, numbers: Tensor) -> MatrixRef | None:
    """Where a saved tensor holds some numbers; None where it does in no form that is known."""
    where = (tensor == numbers.flatten()[0]).nonzero()
    index = int(where[0, 0]) if tensor.ndim > numbers.ndim else None
    for half, interleaved in ((None, False), (0, False), (1, False), (0, True), (1, True)):
        for transposed in (False, True):
            place = MatrixRef(name, index, transposed, half, interleaved)
            view = place.view(tensor)
            if view.shape == numbers.shape and torch.equal(view, numbers):
                return place
    return None


def reads_parts(model: Any, places: Mapping[str, MatrixRef], parameters: Iterable[str]) -> bool:
    """Whether transformers, where it renames some ``parameters`` as it loads them, renames what is stored
    beside or instead of them ("x.weight_packed") likewise. Not of modules that are called weights themselves:
    where it dequantizes, it takes "x_weight.weight_packed" for a part of "x"."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    renamed = {n: places[n].parameter for n in parameters if n in places}
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    return all(
        not name.endswith("_weight.weight")
        and (name == stored or apply_renamings(f"{stored}_packed", renamings) == f"{name}_packed")
        for name, stored in renamed.items()
    )


class NamedSource:
    """A :class:`~srcr.models.source.WeightSource` of a checkpoint's files under the names that tensors have
    in the model. Files have them by ``places``, or where there are none such by the model's own names, in
    stacks or not."""

    def __init__(
        self, files: CheckpointSource, places: Mapping[str, MatrixRef], model: Any
    ) -> None:
        self.files = files
        self.config: Any = files.config
        stored, own = set(files.names()), _own_places(model)
        self._places: dict[str, MatrixRef] = {}
        for name, place in places.items():
            candidates = (p for p in (place, own[name], MatrixRef(name)) if p.parameter in stored)
            stands = next(candidates, None)
            if stands is not None:
                self._places[name] = stands

    def config_dict(self) -> dict[str, Any]:
        """``config.json`` as written."""
        return self.files.config_dict()

    def names(self) -> Sequence[str]:
        """Every tensor of the model that the files have."""
        return list(self._places)

    def meta(self, name: str) -> Tensor:
        """A tensor's shape and precision by the header."""
        place = self._places[name]
        return place.view(self.files.meta(place.parameter))

    def get(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        place = self._places[name]
        if place.index is None:
            return self.files.get(place.parameter)
        return place.rows(self.files.part(place.parameter, place.index)).contiguous()

    def check_used(self, names: Iterable[str]) -> tuple[str, ...]:
        """The tensors of the files that are none of a model's, whose ``names`` these are.

        Raises:
            InputError: they say how its weights are stored.
        """
        known = (self._places[name] for name in names if name in self._places)
        return self.files.check_used({place.parameter for place in known})
