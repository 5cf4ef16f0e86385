"""``python -m srcr`` is the ``srcr`` command."""

from srcr.cli import process

process()
