"""What `mkdocs build` does besides: references of docstrings (``:func:`name```) are shown as their names."""

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|py:\w+):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """The page without the names of roles."""
    return _ROLE.sub("", html).replace("<code>~", "<code>")
