"""Frozen dataclasses to JSON and YAML, and back through a check of every type.

Anything read from a file goes through :func:`from_dict` or :func:`from_yaml`, which say what does not fit;
anything written goes through :func:`to_dict` or :func:`to_yaml`.
"""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from srcr.errors import InputError, in_one_line

if TYPE_CHECKING:  # help of the command line does without
    from pydantic import ConfigDict

T = TypeVar("T")

#: ``__pydantic_config__`` of what people write by hand: unknown keys are refused.
STRICT: "ConfigDict" = {"extra": "forbid"}
#: ``metadata`` of a field that is written as null where it is None.
NULLABLE = {"null": True}


def to_dict(value: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types; fields that are None by default and None are left out, unless they
    are :data:`NULLABLE`."""

    def written(field: dataclasses.Field[Any], item: Any) -> bool:
        return item is not None or field.default is not None or "null" in field.metadata

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            pairs = ((f, getattr(item, f.name)) for f in dataclasses.fields(item))
            return {f.name: plain(part) for f, part in pairs if written(f, part)}
        if isinstance(item, tuple | list):
            return [plain(part) for part in item]
        if isinstance(item, dict):
            return {str(key): plain(part) for key, part in item.items()}
        return item

    result = plain(value)
    assert isinstance(result, dict)
    return result


def from_dict(kind: type[T], data: Any, where: str = "input") -> T:
    """The ``kind`` that plain ``data`` describes.

    Raises:
        InputError: names the place and the value that do not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in problem['loc']) or where}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise InputError(f"{where} does not fit {kind.__name__}: " + "; ".join(lines)) from None


def digest(value: Any) -> str:
    """The SHA-256 of a dataclass or of plain JSON types."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    import hashlib  # help of the command line does without

    return hashlib.sha256(text.encode()).hexdigest()


def to_json(value: Any) -> str:
    """Plain JSON types, or a dataclass, as a file's text: two spaces and a final newline."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {in_one_line(error)}") from None


def to_yaml(value: Any) -> str:
    """A dataclass as YAML that people can read and edit."""
    import yaml

    return yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True)


@cache
def _loader() -> Any:
    """Safe YAML with decimal numbers only: YAML 1.1 would read the structure 2:4 as base 60."""
    import yaml

    class Loader(yaml.SafeLoader):
        """As :func:`_loader` says."""

    Loader.yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789")
    )
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
    )
    return Loader


def read_yaml(path: Path) -> Any:
    """What a YAML (or JSON) file holds.

    Raises:
        InputError: it cannot be read, or is not YAML.
    """
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), _loader())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise InputError(f"{path} is not valid YAML: {in_one_line(error)}") from None


def from_yaml(kind: type[T], path: Path) -> T:
    """The ``kind`` that a YAML (or JSON) file describes.

    Raises:
        InputError: the file is missing, not YAML, or does not fit.
    """
    return from_dict(kind, read_yaml(path), where=str(path))
