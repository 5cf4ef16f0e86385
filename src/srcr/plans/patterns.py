"""Patterns that choose layers by their module names: globs, and regular expressions behind ``re:``.

The spelling is that of compressed-tensors and llm-compressor: ``re:`` matches from the beginning of the name.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from srcr.errors import InputError

REGEX = "re:"
#: How many names an error shows, and how alike they must be.
SHOWN, ALIKE = 3, 0.4


def matches(name: str, pattern: str) -> bool:
    """Whether a module name matches a pattern.

    >>> matches("model.layers.0.mlp.down_proj", "*.mlp.*")
    True
    >>> matches("model.layers.0.mlp.down_proj", r"re:model\\.layers\\.[0-3]\\.")
    True

    Raises:
        InputError: the regular expression is none.
    """
    if not pattern.startswith(REGEX):
        return fnmatchcase(name, pattern)
    try:
        return re.match(pattern.removeprefix(REGEX), name) is not None
    except re.error as error:
        raise InputError(f"pattern {pattern!r} is no regular expression: {error}") from None


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name matches one of several patterns."""
    return any(matches(name, pattern) for pattern in patterns)


def check_patterns(what: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse a pattern of ``what`` (targets, say) that matches none of the ``names``.

    Raises:
        InputError: names the pattern, and the names that are nearest to it.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            nearest = ", ".join(_nearest(pattern, names))
            raise InputError(
                f"{what} pattern {pattern!r} matches no layer: the nearest are {nearest} (globs such as "
                "'*.down_proj', or re: and a regular expression)"
            )


def _nearest(pattern: str, names: Collection[str]) -> list[str]:
    """The names that look most like a pattern, most alike first; the first names where none does."""
    plain = re.sub(r"[*?\[\]^$\\()+|]", "", pattern.removeprefix(REGEX))
    return difflib.get_close_matches(plain, names, SHOWN, ALIKE) or list(names)[:SHOWN]
