"""Remove the experts that matter least: by two scores, of which a model's KL on a few rows decides."""

from srcr.models.checkpoint import OpenModel
from srcr.pipelines.progress import stage
from srcr.pipelines.removal import Setting
from srcr.records.run import StructureRecord
from srcr.storage.journal import Journal
from srcr.structure.depth import model_kl
from srcr.structure.experts import AVERAGES, expert_contributions, least_experts
from srcr.structure.sizes import StructureSize
from srcr.transforms.fewer_experts import expert_groups, fewer_experts

#: Where the choice lies, in the folder of the work in progress.
EXPERTS = "structures-experts"


def remove_experts(
    opened: OpenModel, size: StructureSize, setting: Setting
) -> tuple[OpenModel, StructureRecord]:
    """The model without the experts of every layer that add least to what it gives."""
    with setting.stage_journal(EXPERTS) as journal:
        if not journal.entries:
            _choose_experts(opened, size, setting, journal)
        entry = journal.entries[0]
    gone = {name: tuple(map(int, numbers)) for name, numbers in entry["gone"].items()}
    record = StructureRecord("experts", size.size, size.left, experts=gone)
    return opened.transformed(fewer_experts(opened, gone)), record


def _choose_experts(
    opened: OpenModel, size: StructureSize, setting: Setting, journal: Journal
) -> None:
    """Choose by each score, measure both, and note the better."""
    blocks = opened.blockwise.on(setting.blocks.device)
    count = len(blocks.topology.blocks)
    with stage("experts", count + 2, setting.quiet) as bar:

        def on_block(index: int) -> None:
            bar.note(f"block {index + 1} of {count}", advance=1)

        contributions = expert_contributions(blocks, setting.batches, on_block)
        rows = setting.measured_rows(blocks, opened.vocabulary)
        groups = expert_groups(opened)
        choices = {
            each: least_experts(contributions, size.count, each, groups) for each in AVERAGES
        }
        losses = {}
        for average, gone in choices.items():
            smaller = opened.transformed(fewer_experts(opened, gone))
            losses[average] = model_kl(blocks, rows, smaller.blockwise.on(blocks.device))
            bar.note(f"{size} by tokens {average}: KL {losses[average]:.4g}", advance=1)
        best = min(AVERAGES, key=losses.__getitem__)
        bar.reach(count + 2, f"{size}, KL {losses[best]:.4g}")
    setting.note(journal, {}, gone=choices[best], average=best)
