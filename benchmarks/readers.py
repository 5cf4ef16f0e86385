"""What the scripts share that let other programs read srcr's checkpoints: asking them, and the table."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def answers(python: str, program: str, folder: Path, **variables: str) -> list[dict[str, Any]]:
    """The JSON objects, a line each, that a ``program`` prints of a folder, run by an interpreter with these
    environment variables; the hub is out of its reach. Ends with an error line where it fails."""
    done = subprocess.run(
        [python, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if done.returncode or not lines:
        raise SystemExit(f"error: {python} failed: {done.stderr.strip().splitlines()[-1:]}")
    return lines


def table(cells: Mapping[tuple[str, str], str]) -> str:
    """Markdown: the cells by their rows and columns, in the order that these come."""
    rows, columns = (list(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))
    lines = [f"| checkpoint | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        shown = (cells.get((row, column), "") for column in columns)
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
