"""The files of an output folder by name."""

RECORD = "srcr.json"
PLAN = "plan.yaml"
CARD = "README.md"
EVALUATION = "evaluation.json"
REPORT = "report.html"
SEARCH = "search.json"
RUN = "run.yaml"
CONFIG = "config.json"
GGUF = "model.gguf"
ARCHIVE = "model.srcrz"
#: In a folder that srcr is writing: the journal, and the mark that it may be replaced.
JOURNAL = ".srcr-in-progress"
#: Beside it: what the run that is writing holds.
LOCK = ".srcr-lock"
