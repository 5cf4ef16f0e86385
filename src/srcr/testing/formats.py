"""What every format must do: give back what was written, tell what it writes, and refuse the rest aloud."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from srcr.errors import InputError
from srcr.formats import Format, detect, get_format
from srcr.formats.checkpoint import Checkpoint, DequantizedSource
from srcr.models.streaming import CastTensors, filled
from srcr.numerics.compressed import CompressedWeight
from srcr.plans.plan import Recipe
from srcr.plans.resolve import AUTO_GROUPS
from srcr.plans.specs import PruneSpec, QuantSpec
from srcr.serialize import to_json
from srcr.storage.index import containers
from srcr.storage.safetensors import TensorFiles
from srcr.testing.checkpoints import compressed_checkpoint
from srcr.testing.families import tiny_model
from srcr.testing.requirement import require

#: What a format is tried with, where it can hold it.
RECIPES = {
    "25 % + 4 bits": Recipe(PruneSpec("magnitude", 0.25), QuantSpec("rtn", 4)),
    "3 bits, zero-points, groups": Recipe(None, QuantSpec("rtn", 3, 16, False)),
    "2:4, not quantized": Recipe(PruneSpec.of("magnitude", 0, "2:4"), None),
}
#: Separate and fused linears, biases, tied embeddings, transposed weights.
TRIED_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64},
    "opt": {},
    "gpt2": {},
}
#: How far logits may be apart, relative and absolute.
TOLERANCE = 1e-4


def check_format(fmt: str | Format) -> list[str]:
    """The settings that the format holds, of those that it is tried with: "llama, 25 % + 4 bits".

    Raises:
        AssertionError: it holds none; what it writes is not read back to the bit, is not recognised, is
            loaded to other logits, is not what ``layout`` says, or differs from time to time; it refuses by
            anything but an InputError.
    """
    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    require(bool(fmt.name and fmt.summary), "a format has a name and a summary")
    held = []
    for family, changes in TRIED_FAMILIES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for title, recipe in RECIPES.items():
                model = tiny_model(family, dtype, **changes)
                checkpoint = compressed_checkpoint(model, recipe, fmt)
                try:
                    fmt.check(checkpoint.contents)
                except InputError:
                    continue
                held.append(f"{family}, {title}")
                with tempfile.TemporaryDirectory() as folder:
                    _check_folder(fmt, checkpoint, tiny_model(family, **changes), Path(folder))
    require(bool(held), f"{fmt.name} holds nothing that it was tried with")
    return list(dict.fromkeys(held))


def _check_folder(fmt: Format, checkpoint: Checkpoint, model: Any, folder: Path) -> None:
    """``model``: of the same family in float32, to be filled with the checkpoint's weights."""
    first, again, copy = (folder / name for name in ("first", "again", "copy"))
    for place in (first, again, copy):
        place.mkdir()
    fmt.write(checkpoint, first)
    fmt.write(checkpoint, again)
    require(_bytes(first) == _bytes(again), f"{fmt.name} writes other bytes the second time")
    require(fmt.recognises(first), f"{fmt.name} does not recognise what it wrote")
    require(
        detect(first).name == fmt.name, f"{detect(first).name} recognises what {fmt.name} wrote"
    )
    _check_layout(fmt, checkpoint, first)
    written = fmt.read(first)
    _check_weights(fmt, checkpoint, written)
    fmt.write(written, copy)
    require(_bytes(first) == _bytes(copy), f"{fmt.name} read and written again is not the same")
    require(
        fmt.loaded_bytes(first, checkpoint.contents).n_bytes > 0,
        f"{fmt.name} says that it is loaded to nothing",
    )
    _check_logits(fmt, checkpoint, model, first)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _check_layout(fmt: Format, checkpoint: Checkpoint, folder: Path) -> None:
    """Of a format of safetensors files, what compressed linears are stored as."""
    if containers(folder):
        return
    files, contents = TensorFiles(folder), checkpoint.contents
    for name in contents.compressed:
        ref, shape = contents.topology.matrix(name), contents.topology.shape(name)
        layout = fmt.layout(ref, shape, contents.schemes.get(name), checkpoint.dtype)
        for key, tensor in layout.items():
            require(key in files, f"layout of {fmt.name} says {key}, which is not written")
            actual = files.meta(key)
            require(
                actual.shape == tensor.shape and actual.dtype == tensor.dtype,
                f"layout of {fmt.name} says {tuple(tensor.shape)} {tensor.dtype} of {key}, which is "
                f"{tuple(actual.shape)} {actual.dtype}",
            )


def _check_weights(fmt: Format, checkpoint: Checkpoint, written: Checkpoint) -> None:
    name = fmt.name
    configs = [to_json(dict(each.config)) for each in (written, checkpoint)]
    require(configs[0] == configs[1], f"{name} changes the config")
    require(written.dtype == checkpoint.dtype, f"{name} changes the precision")
    for linear in checkpoint.contents.topology.linears():
        expected, actual = checkpoint.weight(linear), written.weight(linear)
        require(
            torch.equal(actual.to(checkpoint.dtype), expected.to(checkpoint.dtype)),
            f"{name} gives {linear} back changed",
        )
    for linear, scheme in written.contents.schemes.items():
        planned = checkpoint.contents.schemes[linear]
        # A format with group sizes of its own stores codes in blocks, of whatever width holds them.
        own = fmt.group_sizes != AUTO_GROUPS and scheme.num_bits >= planned.num_bits
        require(own or scheme == planned, f"{name} changes {linear}'s scheme")
        require(
            _same_grid(written.read(linear), checkpoint.read(linear)),
            f"{name} changes the codes or the grid of {linear}",
        )
    for tensor in checkpoint.plain_names():
        require(
            torch.equal(written.tensor(tensor), checkpoint.tensor(tensor)),
            f"{name} changes {tensor}, which is not compressed",
        )


def _same_grid(left: CompressedWeight, right: CompressedWeight) -> bool:
    if left.grid is None or right.grid is None or left.codes is None or right.codes is None:
        return False
    steps = [w.grid.steps(w.codes) for w in (left, right) if w.grid and w.codes is not None]
    scales = [w.grid.expand().scale for w in (left, right) if w.grid]
    used = steps[0] != 0
    return torch.equal(*steps) and torch.equal(scales[0][used], scales[1][used])


@torch.no_grad()
def _check_logits(fmt: Format, checkpoint: Checkpoint, model: Any, folder: Path) -> None:
    tokens = torch.arange(12)[None] % model.config.vocab_size
    stored, dtype = DequantizedSource(checkpoint), checkpoint.dtype
    with filled(model, CastTensors(stored, dtype, torch.float32, torch.device("cpu"))):
        expected = model(tokens, use_cache=False).logits
    logits = fmt.load(folder, torch.float32)(tokens, use_cache=False).logits
    require(
        torch.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE),
        f"what {fmt.name} wrote is loaded to other logits",
    )
