"""The bundled task sets as a folder that lm-evaluation-harness runs."""

import json
from dataclasses import asdict
from pathlib import Path

import yaml

from srcr.bundled import tasks
from srcr.errors import InputError

PREFIX = "srcr_"


def write_task_folder(folder: Path) -> tuple[str, ...]:
    """Write one YAML and one JSON Lines file a set; return the harness's names of the tasks.

    The YAML files name the data by absolute path, as `datasets` wants it: write the folder anew
    rather than move it.

    Raises:
        InputError: the folder holds files already.
    """
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in tasks().items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(asdict(item))}\n" for item in items))
        task = {
            "task": PREFIX + name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",  # the choices begin with their space
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return tuple(PREFIX + name for name in tasks())
