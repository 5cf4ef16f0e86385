"""The files of a compressed model's folder that say what was done to it.

Whoever uploads the folder uploads them too: absolute paths stand in none of them (``srcr.records.sharing``).
"""

from pathlib import Path

from srcr.errors import InputError
from srcr.plans.plan import CompressionPlan
from srcr.records.card import model_card, with_evaluation
from srcr.records.evaluation import Evaluation
from srcr.records.run import RunRecord
from srcr.records.search import SearchResult
from srcr.records.sharing import shareable
from srcr.serialize import from_yaml, to_json, to_yaml
from srcr.storage.files import write_text
from srcr.storage.layout import CARD, EVALUATION, PLAN, RECORD, SEARCH


def read_records(folder: Path) -> tuple[RunRecord, CompressionPlan]:
    """What was done to the model in a folder.

    Raises:
        InputError: srcr did not write it.
    """
    for name in (RECORD, PLAN):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} has no {name}: srcr goes on from what it compressed, with 'srcr compress'"
            )
    return from_yaml(RunRecord, folder / RECORD), from_yaml(CompressionPlan, folder / PLAN)


def write_records(folder: Path, record: RunRecord, plan: CompressionPlan) -> RunRecord:
    """The record as it is written, beside the plan and the model card."""
    record = shareable(record)
    (folder / PLAN).write_text(to_yaml(plan), encoding="utf-8")
    (folder / RECORD).write_text(to_json(record), encoding="utf-8")
    (folder / CARD).write_text(model_card(record, plan), encoding="utf-8")
    return record


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write the evaluation, and its figures into the card of a model that srcr compressed."""
    write_text(folder / EVALUATION, to_json(shareable(evaluation)))
    if (folder / RECORD).is_file() and (folder / CARD).is_file():
        card = (folder / CARD).read_text(encoding="utf-8")
        write_text(folder / CARD, with_evaluation(card, evaluation))


def write_search(folder: Path, result: SearchResult, winner: Evaluation) -> SearchResult:
    """What a search measured and chose as it is written, beside what its winner, the model in the folder,
    keeps."""
    write_evaluation(folder, winner)
    result = shareable(result)
    write_text(folder / SEARCH, to_json(result))
    return result
