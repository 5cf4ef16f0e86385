"""The documents of a text source, in order."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from srcr import bundled
from srcr.data.chat import (
    CHAT_FIELDS,
    FIELDS,
    Document,
    clean_text,
    has_document,
    is_blank,
    row_document,
    value_document,
)
from srcr.data.specs import check_source
from srcr.data.tokens import seed_stream
from srcr.errors import InputError, first_line


def read_documents(source: str, seed: int, purpose: str) -> Iterable[Document]:
    """The documents of a source by name, without those that are null or blank: ``bundled``, a ``.txt``,
    ``.jsonl`` or ``.parquet`` file (each row a text or a chat), or ``hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]``.

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
    check_source(source)
    path = Path(source)
    readers: dict[str, Callable[[Path], list[Document]]]
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    documents = [each for each in readers[path.suffix](path) if not is_blank(each)]
    if not documents:
        raise InputError(f"text file {source} is empty")
    return documents


def dataset_documents(dataset: Any) -> Iterator[Document]:
    """The documents of a ``datasets.Dataset`` in memory, each row a text or a chat.

    Raises:
        InputError: it has no such column, or that does not hold what it should.
    """
    names = dataset.column_names or ()
    if not has_document(names):
        raise InputError(
            f"the dataset has no column 'text' (it has {', '.join(names) or 'none'}), and no chat "
            f"({CHAT_FIELDS}): rename the column that holds the text"
        )
    for number, row in enumerate(dataset):
        document = row_document(row, f"the dataset's row {number}")
        if not is_blank(document):
            yield document


def list_documents(texts: Sequence[str]) -> list[str]:
    """The documents of a list.

    Raises:
        InputError: it is empty, or something in it is not a string.
    """
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise InputError(f"texts must be strings, not {type(wrong).__name__}")
    documents = [text for text in map(clean_text, texts) if text.strip()]
    if not documents:
        raise InputError("the list of texts is empty")
    return documents


def _read_txt(path: Path) -> list[Document]:
    return [_read_file(path)]


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None


def _read_jsonl(path: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(_read_file(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{place} is not JSON: {error}") from None
        if not isinstance(row, dict) or not has_document(list(row)):
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(
                f"{place} has no string field 'text' (it has: {keys}), and no chat ({CHAT_FIELDS})"
            )
        documents.append(row_document(row, place))
    return documents


def _read_parquet(path: Path) -> list[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {path} needs pyarrow: pip install 'srcr[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a valid parquet file: {error}") from None
    names = table.column_names
    if not has_document(names):
        raise InputError(
            f"{path} has no column 'text' (it has: {', '.join(names)}), and no chat ({CHAT_FIELDS})"
        )
    rows = table.select([name for name in names if name in FIELDS]).to_pylist()
    return [row_document(row, f"{path} row {number}") for number, row in enumerate(rows)]


def _read_hub(source: str) -> Iterator[Document]:
    """Documents of ``hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]``, streamed."""
    parts = source.split(":")[1:]
    name, config, split, column = (parts + [""] * 4)[:4]
    if not name or len(parts) > 4:
        raise InputError(f"text source {source!r}: use hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source} needs the datasets library: pip install 'srcr[hub]'") from None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            document = _hub_document(row, column, source, number)
            if not is_blank(document):
                yield document
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: file, network, name, script
        raise InputError(f"{source} cannot be read: {first_line(error)}") from None


def _hub_document(row: Mapping[str, Any], column: str, source: str, number: int) -> Document:
    """The document of a row: what its ``column`` holds, or where none is named its text or its chat."""
    place = f"{source} row {number}"
    if not column and has_document(list(row)):
        return row_document(row, place)
    column = column or "text"
    if column not in row or not isinstance(row[column], str | list | None):
        raise InputError(f"{source} has no text column {column!r} (it has: {', '.join(row)})")
    return value_document(row[column], column, place)
