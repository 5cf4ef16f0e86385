"""``python -m srcr`` is the ``srcr`` command."""

from srcr.cli.process import start

start()
