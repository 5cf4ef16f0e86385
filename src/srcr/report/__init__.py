"""The HTML report: one self-contained file, built from the JSON that the other commands write."""

from srcr.report.html import build_report, write_report
from srcr.report.results import check_results, write_results
from srcr.report.runs import Run, load_runs

__all__ = [
    "Run",
    "build_report",
    "check_results",
    "load_runs",
    "write_report",
    "write_results",
]
