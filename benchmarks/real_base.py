"""Accuracy of a model on every task of a folder, and whether that is above chance.

python benchmarks/real_base.py MODEL TASKS OUT.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from srcr.metrics.retention import PairedScores
from srcr.metrics.tasks import resolve_tasks, run_tasks
from srcr.models.load import load_model, load_tokenizer


def main() -> None:
    """Run the tasks in float32, as `srcr evaluate` does, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    tasks = resolve_tasks([str(args.tasks.resolve())])
    model = load_model(Path(args.model), torch.float32)
    results = run_tasks(tasks, model, load_tokenizer(Path(args.model)))
    found = {}
    for name, result in results.items():
        correct = np.array(result.correct, dtype=float)
        scores = PairedScores(correct, correct, result.chance)
        found[name] = {
            "base": float(correct.mean()),
            "chance": result.chance,
            "n": len(correct),
            "above_chance": not scores.at_chance,
        }
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
