"""Where the results of an evaluation are written: a file, and the folders of the compressed models."""

import os
from collections.abc import Sequence
from pathlib import Path

from srcr.errors import InputError
from srcr.pipelines.folder import write_evaluation
from srcr.records.evaluation import Evaluation
from srcr.report.html import write_report
from srcr.serialize import to_dict, to_json
from srcr.storage.files import check_new_file, write_text
from srcr.storage.layout import EVALUATION, REPORT


def check_results(out: Path | None, folders: Sequence[str | Path], overwrite: bool) -> None:
    """Refuse, before any work, to write over anything: ``out``, and in each of ``folders`` the evaluation
    and the report.

    Raises:
        InputError: names the path and the remedy.
    """
    if out is not None:
        check_new_file(out, overwrite)
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise InputError(
                f"--report writes into the compressed folder, and {folder} is none here: use -o FILE, and "
                "'srcr report FILE'"
            )
        if not os.access(folder, os.W_OK):
            raise InputError(
                f"--report cannot write into {folder}: use -o FILE, and 'srcr report FILE'"
            )
        for name in (EVALUATION, REPORT):
            if (folder / name).exists() and not overwrite:
                raise InputError(
                    f"{folder / name} exists from an earlier evaluation: use --overwrite to replace it "
                    "with what is measured now, which may be less"
                )


def write_results(evaluations: Sequence[Evaluation], out: Path | None, into_folders: bool) -> None:
    """Write the JSON to ``out`` (one object, or a list); with ``into_folders`` also ``evaluation.json``,
    ``report.html`` and the model card's figures in each compressed folder."""
    if out is not None:
        data = [to_dict(evaluation) for evaluation in evaluations]
        write_text(out, to_json(data[0] if len(data) == 1 else data))
    if not into_folders:
        return
    for evaluation in evaluations:
        write_evaluation(Path(evaluation.compressed), evaluation)
    for evaluation in evaluations:
        folder = Path(evaluation.compressed)
        write_report([folder], folder / REPORT, overwrite=True)
