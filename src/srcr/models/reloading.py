"""What transformers does with a model's linears when it loads it again."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn


def needs_weights(model: Any, linears: Iterable[str]) -> bool:
    """Whether transformers asks the ``linears`` for their weights while it loads ``model``, even where those
    are stored as packed codes: the class initialises them itself (Falcon, GPT-BigCode, nanochat).

    Tried on a copy without data, whose linears have no weight, as transformers makes it.
    """
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in model.parameters()}
    empty = copy.deepcopy(model, shapes)
    for module in empty.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for name in linears:
        del empty.get_submodule(name)._parameters["weight"]
    try:
        empty.initialize_weights()
    except AttributeError:
        return True
    return False
