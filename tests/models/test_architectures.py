"""Every causal LM architecture of the installed transformers: compressed and loaded again, or one clear line.

``SRCR_UPDATE=1`` writes the table of docs/architectures.md anew.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import transformers

from architectures import ARCHITECTURES, NOT_BUILT, tiny_architecture
from srcr.data.tokens import Tokens
from srcr.errors import InputError
from srcr.formats import load
from srcr.pipelines.compress import compress
from srcr.pipelines.options import RunOptions
from srcr.plans.plan import Recipe
from srcr.plans.specs import PruneSpec, QuantSpec

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
RECIPE = Recipe(PruneSpec("wanda", 0.25), QuantSpec("rtn", 8, -1))
#: What a refusal says -> how the table says it.
REASONS = {
    r"is a stack of matrices \(fused": "weights in stacks that are not known",
    r"stacks experts in a way": "weights in stacks that are not known",
    r"does not run in a forward pass": "linear layers that text alone does not reach",
    r"runs \d+ times in a forward pass": "layers that run more than once",
    r"no decoder blocks": "no list of decoder blocks",
    r"more than its decoder blocks": "more than its blocks one after the other",
    r"does not run: mat1 and mat2": "linear layers that are more than a product",
    r"does not run block by block": "does not run block by block",
}


def outcome(kind, folder):
    """What becomes of an architecture: a row of the table."""
    if kind in NOT_BUILT:
        return f"not tried: {NOT_BUILT[kind]}"
    model = tiny_architecture(kind)
    model.save_pretrained(folder / "model")
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    out = folder / "out"
    try:
        record = compress(
            str(folder / "model"), out, RECIPE, Tokens.of(ids), RunOptions(quiet=True)
        )
    except InputError as error:
        return refusal(str(error), out)
    assert record.verification.difference <= record.verification.tolerance
    check_error(model, out, ids)
    left = [note for note in record.notes if note.startswith("left as they are")]
    return record.format + (f"; {left[0].split(' weights')[0]} weights" if left else "")


def refusal(message, out):
    """The row of an architecture that was refused, in one line and before anything was written."""
    assert not out.exists()
    assert "\n" not in message
    reasons = [reason for pattern, reason in REASONS.items() if re.search(pattern, message)]
    assert reasons, message
    return f"refused: {reasons[0]}"


@torch.no_grad()
def check_error(model, out, ids):
    """A quarter pruned and 8 bits: the logits are near those of the original."""
    expected, logits = (m(ids, use_cache=False).logits for m in (model, load(out)))
    error = float((expected - logits).norm() / expected.norm())
    assert error < 0.9, f"relative error of the logits: {error:.2f}"


def documented():
    """The rows of the table."""
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.M)
    return dict(rows)


def test_the_table_has_every_architecture():
    if transformers.__version__ == tried_with():
        assert sorted(documented()) == ARCHITECTURES


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_is_compressed_or_refused_in_a_line(kind, tmp_path):
    result = outcome(kind, tmp_path)
    if os.environ.get("SRCR_UPDATE"):
        write(documented() | {kind: result})
    if transformers.__version__ == tried_with():
        assert documented()[kind] == result


def tried_with():
    """The version of transformers that the table is from."""
    return re.search(r"transformers ([\d.]+\d)", DOCS.read_text(encoding="utf-8")).group(1)


def write(rows):
    text = DOCS.read_text(encoding="utf-8")
    head = text[: text.index("| Architecture")]
    head = re.sub(r"transformers [\d.]+\d", f"transformers {transformers.__version__}", head)
    table = "".join(f"| `{kind}` | {rows[kind]} |\n" for kind in sorted(rows))
    DOCS.write_text(
        f"{head}| Architecture | What srcr does |\n|---|---|\n{table}", encoding="utf-8"
    )
