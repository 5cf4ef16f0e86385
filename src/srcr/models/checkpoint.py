"""A model, opened once: what every pipeline takes beside a name."""

import copy
import hashlib
import weakref
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcr.errors import InputError
from srcr.models.blockwise import BlockwiseModel, copy_sharing_weights
from srcr.models.companions import copy_companions
from srcr.models.config import is_quantized
from srcr.models.load import load_model, load_tokenizer, resolve
from srcr.models.naming import NamedSource
from srcr.models.quantized import strip_quantizers
from srcr.models.reloading import changes_weights
from srcr.models.source import CheckpointSource, ModuleSource, WeightSource
from srcr.models.streaming import SourceTensors, empty_model
from srcr.models.topology import Topology
from srcr.models.transformed import TransformedSource
from srcr.models.unfuse import fuse, unfuse
from srcr.numerics.tensors import as_bytes, dtype_name, is_finite
from srcr.serialize import to_json
from srcr.storage.index import file_bytes, weight_files
from srcr.storage.safetensors import hash_and_inspect

#: A folder, a hub id or "bundled"; a transformers model, alone or with its tokenizer; or an open model.
ModelLike = Any
#: What weights may be stored in.
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


class OpenModel:
    """A causal language model, opened once: its config, weights, tokenizer and topology. Made by
    :func:`open_model`; nothing of the weights is read before it is needed.

    >>> opened = open_model("bundled")
    >>> len(opened.topology.blocks)
    8
    """

    def __init__(
        self, name: str, source: WeightSource, folder: Path | None, tokenizer: Any = None
    ) -> None:
        self.name = name
        self.folder = folder
        self.blockwise = BlockwiseModel(source)
        self.source: WeightSource = self.blockwise.source
        if self.dtype not in PRECISIONS:
            dtype = dtype_name(self.dtype)
            raise InputError(
                f"the weights of {name} are {dtype}: convert them to float32, bfloat16 or float16"
            )
        self.leftovers: tuple[str, ...] = ()  # tensors of the files that the model has no place for
        self._tokenizer = tokenizer
        self._loaded: dict[torch.dtype, weakref.ref[Any]] = {}

    @property
    def topology(self) -> Topology:
        """Decoder blocks, groups of linears, couplings."""
        return self.blockwise.topology

    @property
    def dtype(self) -> torch.dtype:
        """The precision that weights are stored in."""
        return self.blockwise.dtype

    @property
    def precision(self) -> torch.dtype:
        """What it writes text in on the CPU, as its blocks run."""
        return self.blockwise.running

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.source.config

    @property
    def architecture(self) -> str:
        """The model's class in transformers."""
        return type(self.blockwise.model).__name__

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        return int(self.blockwise.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where there is none."""
        if self._tokenizer is not None or self.folder is None:
            return self._tokenizer
        return load_tokenizer(self.folder)

    @cached_property
    def sha256(self) -> str:
        """The hash of the weights. They are read once, and every number is checked on the way.

        Raises:
            InputError: a weight is not finite.
        """
        if isinstance(self.source, CheckpointSource):
            return hash_and_inspect(weight_files(self.source.folder), check_finite)
        if self.folder is not None and not isinstance(self.source, TransformedSource):
            return hash_and_inspect(weight_files(self.folder), check_finite)
        digest = hashlib.sha256(to_json(self.source.config_dict()).encode())
        for name in self.blockwise.names():
            tensor = self.blockwise.tensor(name)
            check_finite(name, tensor)
            digest.update(name.encode())
            digest.update(as_bytes(tensor.cpu()).numpy().data)
        return digest.hexdigest()

    @property
    def parameters(self) -> int:
        """How many numbers the model has, tied ones once."""
        return sum(p.numel() for p in self.blockwise.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files, or of the tensors that they would hold."""
        if self.folder is not None and not isinstance(self.source, TransformedSource):
            return file_bytes(self.folder)
        return sum(self.blockwise.meta(name).nbytes for name in self.blockwise.names())

    def loaded(self, dtype: torch.dtype | None = None) -> Any:
        """The whole model in memory, not to be changed, in ``dtype`` (None: its own, or float32 where that is
        in memory already). While somebody holds it, it is not loaded again."""
        for known in [dtype] if dtype is not None else [self.dtype, torch.float32]:
            model = self._loaded[known]() if known in self._loaded else None
            if model is not None:
                return model
        model = self._load(dtype)
        self._loaded[model.dtype] = weakref.ref(model)
        return model

    def stacked(self, dtype: torch.dtype | None = None) -> Any:
        """:meth:`loaded`, with experts in stacks as transformers has them, as fast as that runs them; in the
        same memory where it was loaded so."""
        model = self.loaded(dtype)
        return fuse(copy_sharing_weights(model)) if self.topology.experts else model

    def _load(self, dtype: torch.dtype | None) -> Any:
        if self.blockwise.in_memory:
            model = self.blockwise.model
            same = dtype is None or dtype == self.dtype
            return model if same else copy.deepcopy(model).to(dtype)
        if isinstance(self.source, CheckpointSource | NamedSource) and self.folder is not None:
            return unfuse(load_model(self.folder, dtype))
        return load_from(self.source, dtype)

    def transformed(self, source: WeightSource) -> "OpenModel":
        """The same model with its weights shown by another source, such as a
        :class:`~srcr.models.transformed.TransformedSource` over this one's.

        Raises:
            InputError: the source lacks a weight of the model that its config describes, or shows it in
                another shape.
        """
        opened = OpenModel(self.name, source, self.folder, self._tokenizer)
        if not opened.blockwise.fits:
            name = opened.blockwise.tensors.misfits(opened.blockwise.model)[0]
            raise InputError(
                f"the transformed weights do not fit their config: {name} is missing or has another shape"
            )
        return opened

    def save_companions(self, folder: Path) -> None:
        """Write every file beside config and weights that belongs to the model: tokenizer, generation config,
        licence."""
        if self.folder is not None:
            copy_companions(self.folder, folder)
            return
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        generation = getattr(self.blockwise.model, "generation_config", None)
        if generation is not None:
            # As it is: transformers' own saving refuses settings that it warned of when they were made.
            generation.to_json_file(folder / "generation_config.json")


def open_model(model: ModelLike, tokenizer: Any = None) -> OpenModel:
    """``model`` opened: a folder, a hub id or "bundled"; a transformers model, alone or as a pair with its
    tokenizer; an open model stays as it is.

    Raises:
        InputError: it cannot be loaded, or srcr cannot handle its architecture.

    >>> open_model("bundled").architecture
    'LlamaForCausalLM'
    """
    if isinstance(model, OpenModel):
        return model
    if isinstance(model, tuple) and len(model) == 2:
        model, tokenizer = model
    if isinstance(model, str | Path):
        return _open_folder(str(model), resolve(model), tokenizer)
    if not (hasattr(model, "config") and hasattr(model, "get_input_embeddings")):
        raise InputError(
            f"a model of type {type(model).__name__} is not known: give a folder, a hub id, 'bundled', or a "
            "transformers causal LM (alone or as a pair with its tokenizer)"
        )
    _check_plain(model)
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    return OpenModel(name, ModuleSource(_as_it_reloads(model)), None, tokenizer)


def _as_it_reloads(model: Any) -> Any:
    """A copy with the very same parameters, in evaluation mode, whose buffers that no checkpoint holds are
    as its config makes them: ``model.bfloat16()`` rounds RoPE's frequencies, loading does not."""
    result = copy_sharing_weights(model).eval()
    fresh: dict[str, Tensor] = {}
    with suppress(InputError):  # a class that transformers cannot build keeps its own
        fresh = dict(empty_model(ModuleSource(model)).named_buffers())
    for name, module in result.named_modules():
        for key in module._non_persistent_buffers_set:
            buffer, own = fresh.get(f"{name}.{key}" if name else key), module._buffers[key]
            if buffer is not None and own is not None and buffer.shape == own.shape:
                module._buffers[key] = buffer.to(own.device)
    return unfuse(result)


def _check_plain(model: Any) -> None:
    """Refuse a model whose modules do not simply hold their weights.

    Raises:
        InputError: they are compressed or offloaded.
    """
    for name, module in model.named_modules():
        linear_without = isinstance(module, torch.nn.Linear) and "weight" not in module._parameters
        if linear_without or type(module._parameters) is not dict:
            raise InputError(
                f"{name} of the {type(model).__name__} that was given holds its weights compressed or "
                "offloaded: give the model's folder, or what srcr.load makes of it"
            )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise InputError(
            f"the {type(model).__name__} that was given has weights without data: load it into memory"
        )


def _open_folder(name: str, folder: Path, tokenizer: Any) -> OpenModel:
    """A checkpoint: from its files as they are needed, where they lie there as the model wants them, else
    from the model that transformers makes of them."""
    if not is_quantized(folder):
        opened = OpenModel(name, CheckpointSource(folder), folder, tokenizer)
        if opened.blockwise.fits and not changes_weights(opened.blockwise.model):
            files = opened.source
            assert isinstance(files, CheckpointSource | NamedSource)
            opened = _as_stored(opened)
            opened.leftovers = files.check_used(opened.blockwise.model.state_dict())
            return opened
    model = unfuse(strip_quantizers(load_model(folder)))
    return OpenModel(name, ModuleSource(model, folder), folder, tokenizer)


def _as_stored(opened: OpenModel) -> OpenModel:
    """The model, or where its config ties weights that differ in its files, the same with a head of its own,
    as transformers loads it.

    Raises:
        InputError: other weights than the head differ.
    """
    if not opened.blockwise.tensors.separate():
        return opened
    untied = TransformedSource(opened.source, {}, config={"tie_word_embeddings": False})
    result = OpenModel(opened.name, untied, opened.folder, opened._tokenizer)
    names = result.blockwise.tensors.separate()
    if names:
        raise InputError(
            f"the config of {opened.name} ties {' and '.join(names)}, which differ in its files: set "
            "tie_word_embeddings to false in config.json, or remove the one that is wrong"
        )
    return result


def load_from(source: WeightSource, dtype: torch.dtype | None = None) -> Any:
    """The causal LM of a source, whole, in evaluation mode, in its own precision (or ``dtype``); its experts
    are linears."""
    model = empty_model(source)
    tensors = SourceTensors(source, model)
    shared: dict[int, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in shared:
                tensor = tensors.get(f"{name}.{key}" if name else key)
                shared[id(parameter)] = torch.nn.Parameter(tensor.contiguous(), False)
            module._parameters[key] = shared[id(parameter)]
        for key, buffer in list(module.named_buffers(recurse=False)):
            full = f"{name}.{key}" if name else key
            if key not in module._non_persistent_buffers_set and full in tensors:
                buffer.copy_(tensors.get(full))
    return model if dtype is None else model.to(dtype)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not finite.

    Raises:
        InputError: names it.
    """
    if tensor.is_floating_point() and not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InputError(
            f"{name} holds {bad} non-finite value{'s' if bad > 1 else ''} (NaN or infinite): "
            "the checkpoint is damaged, load it again from its source"
        )
