"""A model that goes on writing, a token at a time."""

import inspect
from typing import Any

import torch
from torch import Tensor

#: What models call their cache, in what they return and in what they take.
CACHES = ("past_key_values", "cache_params", "state", "mems")
#: How far logits by a cache may be from those without, relative in norm.
TOLERANCE = 0.02


class Decoder:
    """The next token's logits of ``model`` for rows of tokens, of which it is given a piece at a time.

    Uses the model's cache, whatever its name is, where that gives the logits of the whole row: tried once, on
    the second piece. Otherwise the whole rows run again for every piece. ``capacity``: the length that rows
    will have, for which the cache is given room at once (None: it grows).
    """

    def __init__(self, model: Any, capacity: int | None = None) -> None:
        self._model = model
        self._capacity = capacity
        # Where the model can, its head runs on the last position only.
        takes = inspect.signature(getattr(model, "forward", model)).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._cache: dict[str, Any] = {}
        self._ids: Tensor | None = None  # all so far, as long as they may be needed again
        self._works: bool | None = None  # the cache; None: not known yet

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [n, vocabulary] behind the next piece ``ids`` [n, len]."""
        if self._works:
            return self._step(ids)
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], dim=1)
        if self._works is None:
            logits = self._tried(ids)
            if logits is not None:
                return logits
            self._works = False
        return self._whole(self._ids)

    def _tried(self, ids: Tensor) -> Tensor | None:
        """As :meth:`_step`; None where the cache does not work."""
        assert self._ids is not None
        try:
            logits = self._step(ids)
        except Exception:  # models raise what they like where they know no cache
            return None
        if not self._cache:
            return None
        if self._ids.shape[1] > ids.shape[1]:
            whole = self._whole(self._ids[:1]).float()
            error = (logits[:1].float() - whole).norm() / whole.norm().clamp_min(1e-30)
            if bool(error > TOLERANCE):  # what is not finite is the caller's to say
                return None
            self._works, self._ids = True, None
        elif self._capacity is not None:
            self._make_room(self._capacity)
        return logits

    def _make_room(self, capacity: int) -> None:
        """Give a cache of keys and values room for all positions; the next piece shows whether it works."""
        from srcr.data.caches import preallocate  # transformers' caches are slow to import

        for cache in self._cache.values():
            preallocate(cache, capacity)

    def _step(self, ids: Tensor) -> Tensor:
        """The logits by the cache, which is put forward."""
        output = self._model(ids, use_cache=True, **self._options, **self._cache)
        self._cache = {
            name: output[name] for name in CACHES if getattr(output, name, None) is not None
        }
        logits: Tensor = output.logits[:, -1]
        return logits

    def _whole(self, ids: Tensor) -> Tensor:
        """The logits without a cache."""
        logits: Tensor = self._model(ids, use_cache=False, **self._options).logits[:, -1]
        return logits


def cache_width(config: Any) -> int:
    """Keys and values of a token in all layers of a model of a transformers config, as numbers; 0 where it
    has no attention heads."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None) or 0
    if not heads:
        return 0
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * heads * width * text.num_hidden_layers)
