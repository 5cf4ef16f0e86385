"""Records as they are written into a folder that may be uploaded: nothing of the machine in them.

An absolute path becomes its last part (a model in the hub's cache its id), and the user and password of a
database's URL go. Relative paths stay as they were given.
"""

import dataclasses
import re
import shlex
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

T = TypeVar("T")

#: A snapshot in the hub's cache.
CACHED = re.compile(r"(?:^|/)models--(?P<repo>[^/]+--[^/]+)/snapshots/[0-9a-f]{7,40}/?$")
#: Fields that hold a text's own words, and those that hold a command line.
_WORDS, _COMMANDS = ("worst",), ("command",)
#: What may stand before a path in a text, and the path: to the quote that closes it, else to the next space.
_PATH = re.compile(
    r"(?P<before>^|[\s=(,]|hf:|sqlite:///)"
    r"(?:(?P<quote>['\"])(?P<quoted>(?:/|[A-Za-z]:[\\/])[^'\"]+)(?P=quote)"
    r"|(?P<plain>(?:/|[A-Za-z]:[\\/])[^\s'\",;:)]+))"
)
_CREDENTIALS = re.compile(r"://[^/@\s]+@")


def shareable(value: T) -> T:
    """A record, or plain JSON types, without absolute paths and passwords; what models wrote stays word by
    word."""
    result: Any = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        changed = {name: _field(name, part) for name, part in parts.items()}
        result = dataclasses.replace(
            value, **{name: part for name, part in changed.items() if part is not parts[name]}
        )
    elif isinstance(value, dict):
        result = {shareable(key): _field(key, part) for key, part in value.items()}
    elif isinstance(value, tuple | list):
        result = type(value)(shareable(part) for part in value)
    elif isinstance(value, str):
        result = _text(value)
    return result  # type: ignore[no-any-return]


def _field(name: Any, value: Any) -> Any:
    if name in _WORDS:
        return value
    return _command(value) if name in _COMMANDS and isinstance(value, str) else shareable(value)


def _command(text: str) -> str:
    """A command line, each of its words by itself."""
    try:
        words = shlex.split(text)
    except ValueError:  # it was not written by srcr
        return _text(text)
    changed = [_text(word) for word in words]
    return text if changed == words else shlex.join(changed)


def _text(text: str) -> str:
    """A text whose absolute paths are their last parts."""
    if "/" not in text and "\\" not in text:
        return text
    text = _CREDENTIALS.sub("://", text)
    if _is_absolute(text) and "\n" not in text:
        return last_part(text)
    option, equals, path = text.partition("=")
    if option.startswith("--") and " " not in option and _is_absolute(path):
        return option + equals + last_part(path)
    return _PATH.sub(_shortened, text)


def _shortened(match: re.Match[str]) -> str:
    quote = match["quote"] or ""
    return match["before"] + quote + last_part(match["quoted"] or match["plain"]) + quote


def _is_absolute(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def last_part(path: str) -> str:
    """The name of a path: of the hub's cache the model's id, else what follows the last separator."""
    cached = CACHED.search(path)
    if cached is not None:
        return cached["repo"].replace("--", "/", 1)
    windows = not path.startswith("/")
    return (PureWindowsPath(path) if windows else PurePosixPath(path)).name or path
