"""The documents of a text source, in order."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from srcr import bundled
from srcr.data.tokens import seed_stream
from srcr.errors import InputError, first_line


def read_documents(source: str, seed: int, purpose: str) -> Iterable[str]:
    """The documents of a source by name, without those that are null or blank: ``bundled``, a ``.txt``,
    ``.jsonl`` (field ``text``) or ``.parquet`` (column ``text``) file, or
    ``hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]``.

    Raises:
        InputError: the source is not known, missing, empty, or has the wrong columns.
    """
    if source == "bundled":
        parts = (
            bundled.texts(64, seed_stream(seed, f"{purpose} {part}"), split=purpose)
            for part in itertools.count()
        )
        return itertools.chain.from_iterable(parts)
    if source.startswith("hf:"):
        return _read_hub(source)
    path = Path(source)
    readers: dict[str, Callable[[Path], Sequence[str | None]]]
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(
            f"text source {source!r} is not known: use bundled, self, a .txt, .jsonl, .parquet "
            "or .safetensors file, or hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]"
        )
    if not path.is_file():
        raise InputError(f"text file {source} does not exist")
    documents = [text for text in map(_text, readers[path.suffix](path)) if text.strip()]
    if not documents:
        raise InputError(f"text file {source} is empty")
    return documents


def _text(value: str | None) -> str:
    """A document as UTF-8 can write it: nothing for a null, and U+FFFD for half a surrogate pair."""
    return (value or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def dataset_documents(dataset: Any, column: str = "text") -> Iterable[str]:
    """The documents of a ``datasets.Dataset`` in memory.

    Raises:
        InputError: it has no such column, or that does not hold strings.
    """
    names = dataset.column_names or ()
    if column not in names:
        raise InputError(
            f"the dataset has no column {column!r} (it has {', '.join(names) or 'none'}): rename the "
            "column that holds the text"
        )
    for row in dataset:
        if not isinstance(row[column], str | None):
            raise InputError(f"the dataset's column {column!r} does not hold strings")
        if text := _text(row[column]):
            yield text


def list_documents(texts: Sequence[str]) -> list[str]:
    """The documents of a list.

    Raises:
        InputError: it is empty, or something in it is not a string.
    """
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"texts must be strings, not {type(wrong).__name__}")
    documents = [text for text in map(_text, texts) if text.strip()]
    if not documents:
        raise InputError("the list of texts is empty")
    return documents


def _read_txt(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8-sig")]  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None


def _read_jsonl(path: Path) -> list[str | None]:
    documents: list[str | None] = []
    for number, line in enumerate(_read_txt(path)[0].split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("text", 0), str | None):
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"{path} line {number} has no string field 'text' (it has: {keys})")
        documents.append(row["text"])
    return documents


def _read_parquet(path: Path) -> list[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install 'srcr[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a valid parquet file: {error}") from None
    if "text" not in table.column_names:
        raise InputError(f"{path} has no column 'text' (it has: {', '.join(table.column_names)})")
    values: list[str | None] = table.column("text").to_pylist()
    if not all(isinstance(value, str | None) for value in values):
        raise InputError(f"{path}: column 'text' does not hold strings")
    return values


def _read_hub(source: str) -> Iterable[str]:
    """Documents of ``hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]``, streamed."""
    parts = source.split(":")[1:]
    name, config, split, column = (parts + [""] * 4)[:4]
    if not name or len(parts) > 4:
        raise InputError(f"text source {source!r}: use hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} needs the datasets library: pip install 'srcr[hub]'") from None
    column = column or "text"
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get(column, 0), str | None):
                raise InputError(
                    f"{source} has no text column {column!r} (it has: {', '.join(row)})"
                )
            if text := _text(row[column]):
                yield text
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: file, network, name, script
        raise InputError(f"{source} cannot be read: {first_line(error)}") from None
