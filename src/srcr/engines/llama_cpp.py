"""llama.cpp, as the package xllamacpp has it built, by its C interface."""

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcr.engines import Engine
from srcr.errors import InputError, SrcrError
from srcr.storage.layout import GGUF

#: More bytes than the structs that llama.cpp takes by value have; what is behind their end is not read.
STRUCT_BYTES = 1024
#: Room for a text's tokens: so many for a byte, beside those in front of it.
TOKENS_PER_BYTE = 2


class _Params(ctypes.Structure):
    """A struct of parameters: its first numbers are those of a context (``llama_context_params``)."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * (STRUCT_BYTES - 12)),
    )


class _Batch(ctypes.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _Log(lambda level, text, data: None)


@cache
def _library() -> Any:
    """The C functions of llama.cpp.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise InputError(
            "llama.cpp is run by the package xllamacpp, which is not installed: pip install 'srcr[gguf]'"
        )
    paths = sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))
    if not paths:
        raise InputError("the package xllamacpp has no library for this machine")
    library, pointer = ctypes.CDLL(str(paths[0])), ctypes.c_void_p
    types: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Params]),
        "llama_init_from_model": (pointer, [pointer, _Params]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
        "llama_set_n_threads": (None, [pointer, ctypes.c_int32, ctypes.c_int32]),
        "llama_batch_init": (_Batch, [ctypes.c_int32] * 3),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (ctypes.c_int32, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_tokenize": (
            ctypes.c_int32,
            [
                pointer, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32),
                ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
            ],
        ),
        "llama_log_set": (None, [_Log, pointer]),
        "llama_backend_init": (None, []),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
    }  # fmt: skip
    for name, (result, arguments) in types.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_SILENT, None)
    library.llama_backend_init()
    return library


class LlamaModel:
    """A model that llama.cpp has loaded. Made by :func:`open_llama`."""

    def __init__(self, library: Any, model: int, context: int, length: int) -> None:
        self._library, self._model, self._context = library, model, context
        self._vocab = library.llama_model_get_vocab(model)
        self.length = length

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary."""
        return int(self._library.llama_vocab_n_tokens(self._vocab))

    def logits(self, ids: Tensor) -> Tensor:
        """The logits float32 [rows, len, vocabulary] of token ids [rows, len].

        Raises:
            InputError: a row is longer than the context.
            SrcrError: llama.cpp fails.
        """
        if ids.shape[1] > self.length:
            raise InputError(
                f"a row has {ids.shape[1]} tokens, and the context {self.length} was opened for"
            )
        return torch.stack([self._row(row) for row in ids.tolist()])

    def _row(self, ids: Sequence[int]) -> Tensor:
        library, count = self._library, len(ids)
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        status = library.llama_decode(self._context, batch)
        library.llama_batch_free(batch)
        if status != 0:
            raise SrcrError(f"llama.cpp could not decode {count} tokens (status {status})")
        pointer, size = library.llama_get_logits(self._context), count * self.vocabulary
        data = torch.frombuffer(bytearray(ctypes.string_at(pointer, 4 * size)), dtype=torch.float32)
        return data.view(count, -1)

    def tokenize(self, text: str) -> list[int]:
        """The token ids of a text, special tokens in it and those that the model wants in front included."""
        data = text.encode()
        most = TOKENS_PER_BYTE * len(data) + 2
        buffer = (ctypes.c_int32 * most)()
        count = self._library.llama_tokenize(self._vocab, data, len(data), buffer, most, True, True)
        return list(buffer[:count])


@contextmanager
def open_llama(path: Path, length: int, threads: int | None = None) -> Iterator[LlamaModel]:
    """The model of a GGUF file, for rows of at most ``length`` tokens.

    Raises:
        InputError: llama.cpp is not installed, or refuses the file.
    """
    library = _library()
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    if not model:
        raise InputError(f"llama.cpp does not load {path}")
    params = library.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(32, length)
    context = library.llama_init_from_model(model, params)
    if not context:
        library.llama_model_free(model)
        raise InputError(f"llama.cpp makes no context of {length} tokens for {path}")
    threads = threads or torch.get_num_threads()
    library.llama_set_n_threads(context, threads, threads)
    try:
        yield LlamaModel(library, model, context, length)
    finally:
        library.llama_free(context)
        library.llama_model_free(model)


def _unavailable() -> str | None:
    try:
        _library()
    except (InputError, OSError, AttributeError) as error:
        return str(error)
    return None


def _logits(folder: Path, ids: Tensor) -> Tensor:
    with open_llama(folder / GGUF, ids.shape[1]) as model:
        return model.logits(ids)


ENGINE = Engine(
    name="llama.cpp",
    unavailable=_unavailable,
    logits=_logits,
    reads=lambda format_name: format_name == "gguf",
    # Activations are rounded to 8 bits in blocks of 32 wherever weights are quantized.
    tolerance=5e-2,
)
