"""A cache of keys and values that does not move when a token comes."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a :class:`DynamicCache` with room for ``capacity`` positions. transformers' own copies all
    keys and values with every token; its static one is attended to as a whole, behind a mask."""

    def __init__(self, layer: Any, capacity: int) -> None:
        super().__init__()
        self.is_sliding = layer.is_sliding  # which mask the model makes
        self.dtype, self.device = layer.dtype, layer.device
        self._buffers = [_with_room(layer.keys, capacity), _with_room(layer.values, capacity)]
        self.is_initialized = True
        self._show(layer.keys.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [n, heads, positions, width] with the new ones, which go where there is room."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            self._buffers = [_with_room(states, 2 * end) for states in (self.keys, self.values)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values

    def _show(self, positions: int) -> None:
        self.keys, self.values = (buffer[:, :, :positions] for buffer in self._buffers)


def preallocate(cache: Any, capacity: int) -> None:
    """Give the layers of a model's cache room for ``capacity`` positions in all, where they are of a kind
    that holds every position that long; others stay as they are."""
    if type(cache) is not DynamicCache:
        return
    for number, layer in enumerate(cache.layers):
        sliding = type(layer) is DynamicSlidingWindowLayer
        if sliding and layer.sliding_window < capacity:
            continue  # it lets positions go
        if (sliding or type(layer) is DynamicLayer) and layer.get_seq_length():
            cache.layers[number] = PreallocatedLayer(layer, capacity)


def _with_room(states: Tensor, capacity: int) -> Tensor:
    """The states [n, heads, positions, width] at the beginning of a tensor for ``capacity`` positions."""
    n, heads, positions, width = states.shape
    buffer = states.new_empty(n, heads, max(capacity, positions), width)
    buffer[:, :, :positions] = states
    return buffer
