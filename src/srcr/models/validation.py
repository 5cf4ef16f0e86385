"""What is checked of a checkpoint before anything believes it: numbers, and the size it declares.

A checkpoint is a stranger's: its config decides what transformers builds, its files what is read and copied.
Nothing here takes memory or time in proportion to what is declared, only to what is really there.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srcr.errors import InputError, SrcrError, in_one_line
from srcr.storage.safetensors import TensorFiles

#: Keys of config.json that count what transformers makes one by one before anything is measured.
COUNTS = re.compile(r"(layers?|num_labels)$")
#: More of these than any model has.
MAX_COUNT = 10_000
#: Memory for tables that a model computes when it is built, beyond the size of its files.
MAX_TABLES = 1 << 28


def check_counts(path: Path, data: Any) -> None:
    """Refuse a config that has a loop run without end.

    Raises:
        InputError: names the key.
    """
    pending = [data]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, dict):
            for key, value in part.items():
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if number and COUNTS.search(key) and not -1 <= value <= MAX_COUNT:
                    raise InputError(
                        f"{path} says {key} {value}: from 0 to {MAX_COUNT} is possible"
                    )
            pending.extend(part.values())


def check_leftovers(
    folder: Path, leftovers: Sequence[str], names: Collection[str]
) -> tuple[str, ...]:
    """The ``leftovers`` again: tensors of the files that the model, whose tensors' ``names`` these are, has
    no place for.

    Raises:
        InputError: some belong to a weight of the model (scales, zero-points, an adapter): without them it
            means something else.
    """
    # "x.weight_scale" and "x.qzeros" belong to "x.weight", "experts.up_proj_blocks" to "experts.up_proj".
    owners = {name.removesuffix("weight") for name in names if name.endswith(".weight")}
    stacks = [name for name in names if not name.endswith((".weight", ".bias"))]
    owners |= {f"{name}{separator}" for name in stacks for separator in "._"}
    parts = [
        name
        for name in leftovers
        if not name.endswith(".bias")
        and any(name[: match.end()] in owners for match in re.finditer(r"[._]", name))
    ]
    if parts:
        raise InputError(
            f"{folder} holds {len(parts)} tensors that say how its weights are stored, {parts[0]} first, and "
            "its config.json has no quantization_config for them: srcr compresses the original model, not "
            "one that is quantized or adapted already"
        )
    return tuple(leftovers)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """While another library works on a checkpoint: whatever it raises (it raises many kinds) says that the
    checkpoint cannot be used. ``what`` begins the message.

    Raises:
        InputError: it failed; SrcrError: there was not enough memory.
    """
    try:
        yield
    except SrcrError:
        raise
    except Exception as error:
        reason = f"{what}: {in_one_line(error)}"
        if isinstance(error, MemoryError) or _out_of_memory(error):
            raise SrcrError(f"{reason}: there is not enough memory") from error
        raise InputError(reason) from error


def _out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text


def check_size(folder: Path, config: Any, quantized: bool) -> None:
    """Build the model of ``config`` without memory, and refuse it as soon as it declares more than the
    weight files hold: twice their values (a tied head is stored once), or where they are quantized as many
    as could be at one bit each.

    Raises:
        InputError: it declares more, or transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    files = TensorFiles(folder)
    stored = sum(files.sizes().values())
    values = 8 * stored if quantized else sum(math.prod(e.shape) for e in files.entries.values())
    with (
        library_errors(f"transformers cannot build the model of {folder}"),
        torch.device("meta"),
        _counted(folder, 2 * values, stored + MAX_TABLES),
    ):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)


@contextmanager
def _counted(folder: Path, most: int, most_bytes: int) -> Iterator[None]:
    """Modules built meanwhile may have so many parameters, and so many bytes of buffers."""
    register, register_buffer = nn.Module.register_parameter, nn.Module.register_buffer
    parameters = tables = 0
    known: dict[int, nn.Parameter] = {}  # a tied one is registered again

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters
        if parameter is not None and id(parameter) not in known:
            known[id(parameter)] = parameter
            parameters += parameter.numel()
            if parameter.numel() == 0:
                raise InputError(
                    f"{folder}: its config.json makes {name} of a {type(module).__name__} empty, "
                    f"{list(parameter.shape)}"
                )
            if parameters > most:
                raise InputError(
                    f"{folder}: its config.json declares a model of more than {most} parameters, the weight "
                    "files hold far fewer: they do not belong together"
                )
        register(module, name, parameter)

    def weigh(module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        nonlocal tables
        if tensor is not None:
            tables += tensor.nbytes
            if tables > most_bytes:
                raise InputError(
                    f"{folder}: its config.json declares a table {name} {list(tensor.shape)}, far larger "
                    "than the model"
                )
        register_buffer(module, name, tensor, persistent)

    nn.Module.register_parameter = count  # type: ignore[method-assign, assignment]
    nn.Module.register_buffer = weigh  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]
