"""The table of docs/support.md: families x formats, each cell tried.

``python scripts/support_table.py`` compresses a tiny random model of every family, writes it in every
format, and asks every engine that is installed for its logits (``srcr verify``). What came of it goes into
the page.
"""

import re
import tempfile
from pathlib import Path

import srcr
from srcr.errors import InputError
from srcr.formats import Format, formats
from srcr.formats.verify import verify_tensors
from srcr.pipelines.options import RunOptions
from srcr.testing.checkpoints import compressed_checkpoint
from srcr.testing.families import FAMILIES, tiny_model

PAGE = Path(__file__).parents[1] / "docs/support.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
#: Widths that the blocks of every format divide.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
GROUPED = WIDE | {"num_key_value_heads": 1, "head_dim": 32}
SIZES = {
    "gpt2": {"n_embd": 64, "n_head": 2},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 2, "word_embed_proj_dim": 64},
    "phi3": WIDE | {"num_key_value_heads": 1, "sliding_window": None},
    "gpt_neox": WIDE,
    "mistral": GROUPED | {"sliding_window": None},
    "gemma3": GROUPED | {"num_hidden_layers": 6, "query_pre_attn_scalar": 32, "sliding_window": 8},
}
RECIPE = srcr.Recipe(srcr.PruneSpec("magnitude", 0.25), srcr.QuantSpec("rtn", 4))


def outcome(family: str, fmt: Format, folder: Path) -> str:
    """What reads a family's model in a format: the engines that agree, "srcr" alone, or "no".

    Raises:
        AssertionError: an engine that reads the format gives other logits.
    """
    try:
        checkpoint = compressed_checkpoint(
            tiny_model(family, **SIZES.get(family, GROUPED)), RECIPE, fmt
        )
        fmt.check(checkpoint.contents)
    except InputError:
        return "no"
    folder.mkdir(parents=True)
    fmt.write(checkpoint, folder)
    verify_tensors(fmt, checkpoint, folder)
    checks = srcr.verify(folder, options=RunOptions(quiet=True)).checks
    failed = [check for check in checks if check.outcome in ("differs", "fails")]
    assert not failed, f"{family}, {fmt.name}: {failed}"
    agreed = [check.engine for check in checks if check.outcome == "agrees"]
    return ", ".join(agreed) or "srcr"


def row(family: str, place: Path) -> str:
    """A family's row of the table, as Markdown; ``place``: a folder for its checkpoints."""
    cells = [outcome(family, fmt, place / family / name) for name, fmt in formats().items()]
    return f"| {family} | {' | '.join(cells)} |"


def table() -> str:
    """The table, as Markdown."""
    known = formats()
    lines = [f"| | {' | '.join(f'`{name}`' for name in known)} |", "|---" * (len(known) + 1) + "|"]
    with tempfile.TemporaryDirectory() as place:
        lines += [row(family, Path(place)) for family in FAMILIES]
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with the table of now."""
    part = f"{BEGIN}\n{table()}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: part, page, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
