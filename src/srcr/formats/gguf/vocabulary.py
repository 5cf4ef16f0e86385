"""A tokenizer as llama.cpp stores it: tokens, their types, what merges them, and how text is split before."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srcr.errors import InputError

TOKENIZER = "tokenizer.json"
#: Text whose token ids tell how a tokenizer splits (llama.cpp, convert_hf_to_gguf_update.py).
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) "
    "✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 "
    "?我想在apple工作1314151天\uff5e ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!"
    "?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some "
    "tea? We'Ve a'lL"
)
#: How text is split, by the SHA-256 of the probe's token ids (the same source).
PRE_TOKENIZER_BY_PROBE = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "f4f37b6c8eb9ea29b3eac6bb8c8487c5ab7885f8d8022e67edc1c68ce8403e95": "minimax-m2",
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
}
#: How text is split, by the regular expression of a tokenizer.json (Llama 3, Qwen 2).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PRE_TOKENIZER_BY_PATTERN = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
#: Types of tokens in a GGUF file.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: What SentencePiece writes for a space.
SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer. ``model``: "gpt2" (byte-level BPE), "llama" (SentencePiece) or "none";
    ``pre_tokenizer``: the rule that splits text first; ``tokens``, their ``types`` and ``scores`` (of
    SentencePiece); ``merges`` (of BPE); whether a space and the BOS token go in front of a text."""

    model: str
    pre_tokenizer: str = "default"
    tokens: Sequence[str] = ()
    types: Sequence[int] = ()
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    add_space_prefix: bool | None = None
    add_bos: bool | None = None
    special: Mapping[str, int] = field(default_factory=dict)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a model of ``size`` tokens by the tokenizer.json in ``folder``; "none" where there is
    no tokenizer.

    Raises:
        InputError: llama.cpp knows no such tokenizer.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        if any(folder.glob("tokenizer*")):
            raise InputError(
                "gguf: the tokenizer is not a fast one, with a tokenizer.json: save it with transformers' "
                "save_pretrained first"
            )
        return Vocabulary("none")
    data = json.loads(path.read_text(encoding="utf-8"))
    model = data["model"]
    if model.get("type") != "BPE":
        raise InputError(f"gguf: tokenizers of type {model.get('type')!r} are not written, but BPE")
    bytes_level = _is_byte_level(data)
    if not bytes_level and not model.get("byte_fallback"):
        raise InputError(
            "gguf: the tokenizer is BPE neither of bytes nor with a byte for what it does not know, and "
            "llama.cpp knows no other"
        )
    tokens, types = _tokens(data, size)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    special, add_bos = _special(data, folder)
    if bytes_level:
        return Vocabulary(
            "gpt2", _pre_tokenizer(data, path), tokens, types, (),
            [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges],
            None, add_bos, special,
        )  # fmt: skip
    types = [BYTE if _is_byte(t) else type_ for t, type_ in zip(tokens, types, strict=True)]
    return Vocabulary(
        "llama", "default", tokens, types, _scores(tokens, merges), (),
        _prepends_space(data), add_bos, special,
    )  # fmt: skip


def write_vocabulary(writer: Any, vocabulary: Vocabulary, template: str | None) -> None:
    """Give a ``gguf.GGUFWriter`` a vocabulary and the chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == "none":
        return
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.add_bos is not None:
        writer.add_add_bos_token(vocabulary.add_bos)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    if template is not None:
        writer.add_chat_template(template)


def chat_template(folder: Path) -> str | None:
    """The chat template that lies in a folder."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _config(folder).get("chat_template")
    return template if isinstance(template, str) else None


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(data.get("pre_tokenizer")))


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer or normalizer."""
    if part is None:
        return []
    nested = part.get("pretokenizers", part.get("normalizers"))
    return list(nested) if nested is not None else [part]


def _pre_tokenizer(data: Mapping[str, Any], path: Path) -> str:
    """The name of the rule that splits text.

    Raises:
        InputError: none that llama.cpp knows.
    """
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(path)).encode(PROBE).ids
    known = PRE_TOKENIZER_BY_PROBE.get(hashlib.sha256(str(ids).encode()).hexdigest())
    if known is not None:
        return known
    steps = _steps(data.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    for step in steps:
        pattern = step.get("pattern", {})
        if step["type"] == "Split" and pattern.get("Regex") in PRE_TOKENIZER_BY_PATTERN:
            return PRE_TOKENIZER_BY_PATTERN[pattern["Regex"]]
    raise InputError(
        "gguf: llama.cpp has to be told how the tokenizer splits text, and this way is not among those that "
        f"srcr knows ({', '.join(sorted(set(PRE_TOKENIZER_BY_PROBE.values())))})"
    )


def _tokens(data: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The ``size`` tokens of a model and their types; ids without a token are unused."""
    by_id = {number: token for token, number in data["model"]["vocab"].items()}
    types = dict.fromkeys(by_id, NORMAL)
    unknown = data["model"].get("unk_token")
    for token in data.get("added_tokens", ()):
        number, text = token["id"], token["content"]
        control = token["special"] or (text.startswith("<|") and text.endswith("|>"))
        by_id[number] = text if control else text.replace(SPACE, " ")
        types[number] = CONTROL if control else USER_DEFINED
        if text == unknown:
            types[number] = UNKNOWN
    if by_id and max(by_id) >= size:
        raise InputError(
            f"gguf: the tokenizer has the id {max(by_id)}, and the model a vocabulary of {size}"
        )
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    return tokens, [types.get(i, UNUSED) for i in range(size)]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """SentencePiece's scores: of two neighbours that become a token, the token of the higher score is made
    first; so the earliest merge is highest."""
    rank: dict[str, int] = {}
    for place, (first, second) in enumerate(merges):
        rank.setdefault(first + second, place)
    return [-1.0 - rank[token] if token in rank else 0.0 for token in tokens]


def _prepends_space(data: Mapping[str, Any]) -> bool:
    steps = [*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))]
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always")
        for step in steps
    )


def _special(data: Mapping[str, Any], folder: Path) -> tuple[dict[str, int], bool]:
    """The ids of special tokens by what they are for, and whether a text begins with the first."""
    ids = {token["content"]: token["id"] for token in data.get("added_tokens", ())}
    config = _config(folder)
    special = {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        number = ids.get(token, data["model"]["vocab"].get(token))
        if number is not None:
            special[kind] = int(number)
    model = _config(folder, "config.json")
    for kind in ("bos", "eos", "pad"):
        number = model.get(f"{kind}_token_id")
        if kind not in special and type(number) is int:
            special[kind] = number
    template = json.dumps(data.get("post_processor") or {})
    texts = {number: text for text, number in {**data["model"]["vocab"], **ids}.items()}
    bos = texts.get(special.get("bos", -1))
    return special, bos is not None and json.dumps(bos) in template


def _config(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return data if isinstance(data, dict) else {}
