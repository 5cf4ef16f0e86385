"""What the card of the original model says that holds for a compressed one too: its licence and languages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from srcr.storage.layout import CARD


@dataclass(frozen=True)
class BaseCard:
    """The metadata of the original's card that a compressed model inherits."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()


def read_base_card(folder: Path | None) -> BaseCard | None:
    """What the card in a model's folder says; None where there is no card, or none that can be read."""
    if folder is None or not (folder / CARD).is_file():
        return None
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        metadata = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return None  # a stranger's file, which nothing depends on
    if not isinstance(metadata, dict):
        return None
    language = metadata.get("language")
    languages = language if isinstance(language, list) else [language]
    card = BaseCard(
        license=_string(metadata.get("license")),
        license_name=_string(metadata.get("license_name")),
        license_link=_string(metadata.get("license_link")),
        language=tuple(name for name in languages if isinstance(name, str)),
    )
    return None if card == BaseCard() else card


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None
