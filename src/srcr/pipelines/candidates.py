"""Compressed models as an evaluation takes them: loaded, checked against their base, and rated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from srcr.errors import InputError
from srcr.formats import load, recognised
from srcr.formats.checkpoint import Checkpoint
from srcr.metrics.rates import FULL_BITS, LayerRates, count_zeros, entropy_bits, measured_rates
from srcr.models.blockwise import BlockwiseModel, copy_on
from srcr.models.checkpoint import ModelLike, OpenModel, open_model
from srcr.models.load import load_tokenizer, resolve
from srcr.numerics.entropy import sparse_entropy
from srcr.pipelines.progress import stage
from srcr.records.run import LoadedBytes, Rates, RunSummary
from srcr.serialize import from_yaml
from srcr.storage.index import file_bytes
from srcr.storage.layout import RECORD
from srcr.storage.safetensors import TensorFiles


@dataclass(frozen=True, eq=False)
class Candidate:
    """A compressed model: its ``name``, the ``model`` in float32 on the device, its ``rates``, and of its
    record the plan's fingerprint and the hashes of what it was calibrated on."""

    name: str
    model: Any
    rates: Rates
    plan_fingerprint: str | None = None
    calibration_rows: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A compressed model before it is rated, from a ``folder`` or in memory (``opened``), and its
    tokenizer."""

    name: str
    model: Any
    tokenizer: Any | None
    folder: Path | None = None
    opened: OpenModel | None = None

    @cached_property
    def weights(self) -> BlockwiseModel:
        """The linears as the model runs with them."""
        return open_model(self.model).blockwise

    def on(self, device: torch.device) -> Any:
        """The model in float32 on a device; what was in memory before stays as it is."""
        if self.opened is None:
            return self.model.to(device=device, dtype=torch.float32)
        return copy_on(self.opened.stacked(torch.float32), device.type)


def open_candidates(
    base: OpenModel, compressed: Sequence[ModelLike], device: torch.device, quiet: bool = True
) -> tuple[Any, list[Candidate]]:
    """The base in float32 on the device, and every compressed model beside it.

    Raises:
        InputError: a model is given twice, cannot be loaded, or is no version of the base.
    """
    folders = {
        i: resolve(each) for i, each in enumerate(compressed) if isinstance(each, str | Path)
    }
    if len({folder.resolve() for folder in folders.values()}) < len(folders):
        raise InputError("a compressed model was given twice: name each once")
    with stage("load", 1 + len(compressed), quiet) as bar:
        bar.note(base.name)
        reference = copy_on(base.stacked(torch.float32), device.type)
        candidates = []
        for i, each in enumerate(compressed):
            bar.note(str(each) if i in folders else f"model {i + 1}", advance=1)
            loaded = _load(each, folders.get(i))
            size = loaded.model.get_input_embeddings().weight.shape[0]
            check_vocabulary(base, loaded.name, size, loaded.tokenizer)
            candidates.append(_rate(base, loaded, device))
        bar.reach(1 + len(compressed), f"{base.name} and {len(candidates)} compressed")
    return reference, candidates


def _load(model: ModelLike, folder: Path | None) -> _Loaded:
    if folder is not None:
        return _Loaded(str(model), load(folder), _folder_tokenizer(folder), folder=folder)
    opened = open_model(model)
    return _Loaded(opened.name, opened.stacked(), _tokenizer(opened), opened=opened)


def _folder_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a folder, as :func:`_tokenizer`."""
    try:
        return load_tokenizer(folder)
    except InputError:
        return None


def check_vocabulary(base: OpenModel, name: str, size: int, tokenizer: Any | None) -> None:
    """Two models can be compared only if an id means the same to both: the one called ``name`` has a
    vocabulary of ``size``, and a tokenizer or none.

    Raises:
        InputError: it does not.
    """
    if size != base.vocabulary:
        raise InputError(
            f"{name} has a vocabulary of {size}, the base {base.name} one of {base.vocabulary}: they "
            "are not versions of the same model"
        )
    ours, theirs = (_tokens(each, size) for each in (_tokenizer(base), tokenizer))
    # A token that only one of them has (for padding, say) changes no text that both can read.
    shared = ours.keys() & theirs.keys()
    moved = set(ours.values()) & set(theirs.values()) - {ours[id] for id in shared}
    if moved or any(ours[id] != theirs[id] for id in shared):
        raise InputError(
            f"{name} and the base {base.name} have different tokenizers: an id does not mean the same "
            "to both"
        )


def _tokens(tokenizer: Any | None, size: int) -> dict[int, str]:
    """The token of each id that a model of so many ids can be given; none without a tokenizer."""
    if tokenizer is None:
        return {}
    return {id: token for token, id in tokenizer.get_vocab().items() if id < size}


def _tokenizer(model: OpenModel) -> Any | None:
    """The tokenizer; None also where it cannot be loaded, which whoever needs it says."""
    try:
        return model.tokenizer
    except InputError:
        return None


def _rate(base: OpenModel, loaded: _Loaded, device: torch.device) -> Candidate:
    """The candidate, its rates from its record where there is one (bytes counted anew), else from its config
    and weights."""
    folder, fingerprint = loaded.folder, None
    rows: tuple[str, ...] = ()
    if folder is not None and (folder / RECORD).is_file():
        summary = from_yaml(RunSummary, folder / RECORD)
        fingerprint = summary.plan_fingerprint
        if summary.calibration is not None:
            rows = summary.calibration.rows or ()
        rates = replace(
            summary.rates, base_bytes=base.weight_bytes, stored_bytes=file_bytes(folder)
        )
    else:
        rates = _measured(base, loaded)
    return Candidate(loaded.name, loaded.on(device), rates, fingerprint, rows)


def _measured(base: OpenModel, loaded: _Loaded) -> Rates:
    """Rates by the checkpoint's own config and weights."""
    base_size = sum(rows * cols for rows, cols in base.topology.shapes.values())
    if loaded.folder is None:
        assert loaded.opened is not None
        checkpoint, stored = Checkpoint.of(loaded.opened), loaded.opened.weight_bytes
        in_memory = LoadedBytes(stored, "transformers")
    else:
        fmt, stored = recognised(loaded.folder), file_bytes(loaded.folder)
        if fmt is None:
            layers, in_memory = _layers_in_files(loaded.folder, loaded.model)
            return measured_rates(layers, base_size, base.weight_bytes, stored, in_memory)
        checkpoint = fmt.read(loaded.folder)
        in_memory = fmt.loaded_bytes(loaded.folder, checkpoint.contents)
    names = checkpoint.contents.topology.linears()
    layers = [_layer_rates(checkpoint, loaded, name) for name in names]
    return measured_rates(layers, base_size, base.weight_bytes, stored, in_memory)


def _layer_rates(checkpoint: Checkpoint, loaded: _Loaded, name: str) -> LayerRates:
    """Of a linear that is not quantized, zeros count as pruned."""
    topology = checkpoint.contents.topology
    rows, cols = topology.shapes[name]
    scheme = checkpoint.contents.schemes.get(name)
    if scheme is None:
        zeros = count_zeros([checkpoint.weight(name)])
        return LayerRates(rows * cols, zeros, FULL_BITS, zeros, sparse_entropy(zeros))
    try:
        weight = checkpoint.read(name)
        zeros, entropy = count_zeros([weight.dequantize()]), entropy_bits(weight)
    except InputError:  # codes that srcr does not read
        zeros, entropy = count_zeros([loaded.weights.matrix(name)]), None
    return LayerRates(rows * cols, 0.0, scheme.num_bits, zeros, entropy)


def _layers_in_files(folder: Path, model: Any) -> tuple[list[LayerRates], LoadedBytes]:
    """The linears of a checkpoint in a format that srcr does not read, by the bytes of their codes, and the
    bytes of all tensors.

    Raises:
        InputError: the tensors of a linear are not stored under its name.
    """
    sizes, opened = TensorFiles(folder).sizes(), open_model(model)
    topology = opened.topology.as_stored()
    largest: dict[str, int] = {}  # the codes, of what is stored: scales are shared by many weights
    for key, size in sizes.items():
        module = key.rpartition(".")[0]
        largest[module] = max(size, largest.get(module, 0))
    layers = []
    for name in topology.linears():
        ref, (rows, cols) = topology.matrices[name], topology.shapes[name]
        stored = largest.get(ref.module, 0)
        if not stored or ref.index is not None:
            raise InputError(
                f"{folder} stores {name} under another name, so that its bits cannot be counted: give the "
                "folder that srcr wrote"
            )
        zeros = count_zeros([opened.blockwise.matrix(name)])
        layers.append(LayerRates(rows * cols, 0.0, 8 * stored / (rows * cols), zeros, None))
    return layers, LoadedBytes(sum(sizes.values()), "transformers")
