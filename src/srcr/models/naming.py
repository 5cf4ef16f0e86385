"""What a model's tensors are called in checkpoints, where transformers renames or stacks what it reads.

Asked of transformers' own conversions: tensors that are numbered go through them, and come out under the
names that it would save them by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from srcr.models.experts import Experts, experts_of
from srcr.models.matrices import MatrixRef
from srcr.models.source import CheckpointSource


def stored_places(model: Any) -> dict[str, MatrixRef]:
    """Where each tensor of a model with experts (taken apart) lies in checkpoints; empty for one without: its
    tensors go by their own names."""
    experts = experts_of(model)
    if not experts:
        return {}
    places = _own_places(model)
    names = sorted({place.parameter for place in places.values()})
    saved = _saved_names(model, names, _halves(experts), _counts(experts))
    return {name: _saved_place(place, saved[place.parameter]) for name, place in places.items()}


def _own_places(model: Any) -> dict[str, MatrixRef]:
    """Where each tensor lies in the model with its experts in stacks."""
    places = {name: MatrixRef(name) for name in model.state_dict()}
    for prefix, module in experts_of(model).items():
        for name, place in module.places().items():
            places[f"{prefix}.{name}"] = replace(place, parameter=f"{prefix}.{place.parameter}")
    return places


def _halves(experts: Mapping[str, Experts]) -> dict[str, int]:
    """How many projections the rows of each stack hold, by its name in the fused model."""
    halves: dict[str, int] = {}
    for prefix, module in experts.items():
        for place in module.places().values():
            name = f"{prefix}.{place.parameter}"
            halves[name] = max(halves.get(name, 1), 1 + (place.half or 0))
    return halves


def _counts(experts: Mapping[str, Experts]) -> dict[str, int]:
    """How many experts each stack holds, by its name in the fused model."""
    return {
        f"{prefix}.{place.parameter}": module.count
        for prefix, module in experts.items()
        for place in module.places().values()
    }


#: The name of a tensor of a checkpoint by the (expert, half) that it is of; None: it is the whole stack.
Saved = dict[tuple[int, int] | None, str]


def _saved_names(
    model: Any, names: Sequence[str], halves: Mapping[str, int], counts: Mapping[str, int]
) -> dict[str, Saved]:
    """The names by which transformers saves the tensors of the fused model."""
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        numbered = torch.tensor([float(number)])
        if name in counts:  # [experts, halves, 1], each entry with its own number behind the point
            count, half = counts[name], halves[name]
            parts = torch.arange(count * half, dtype=torch.float64).view(count, half, 1)
            numbered = number + parts / (count * half)
        state[name] = numbered
    result: dict[str, Saved] = {name: {} for name in names}
    for saved, tensor in revert_weight_conversion(model, state).items():
        value = float(tensor.reshape(-1)[0])
        name = names[int(value)]
        if name not in counts or tensor.numel() == counts[name] * halves[name]:
            result[name][None] = saved
        else:
            part = round((value - int(value)) * counts[name] * halves[name])
            result[name][divmod(part, halves[name])] = saved
    return result


def _saved_place(place: MatrixRef, saved: Saved) -> MatrixRef:
    """The place of a tensor, given what became of the parameter that it lies in."""
    if None in saved:
        return replace(place, parameter=saved[None])
    assert place.index is not None
    return MatrixRef(saved[place.index, place.half or 0])


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

    def check_used(self) -> tuple[str, ...]:
        """The tensors of the files that are none of the model's.

        Raises:
            InputError: they say how its weights are stored.
        """
        return self.files.check_used({place.parameter for place in self._places.values()})
