"""The calibration tokens and the task files of `real.py`, in one folder.

    python benchmarks/real_data.py MODEL SHARED OUT [--samples 64 --seq-len 256] [--blimp 12 ...]

`calibration.safetensors` is the beginning of a text in the model's tokens, or what the model writes itself,
and `search.safetensors` the same with more rows behind it, on which a search searches, chooses and measures;
`tasks/` has, for the harness, BLiMP's sentence pairs, tasks of BIG-Bench Hard and GSM8K, cut to the first
items. The model's answer is the choice with the highest log-likelihood, but for `gsm8k`, which is generated.

- `blimp`: the first pairs of each paradigm.
- `bbh_*`: up to three solved examples where they are short, then the question. Choices are the texts of its
  options, or Yes and No, or True and False; for a count, three other counts of the task beside the right one.
- `gsm8k_last_step`: question and worked solution up to the last place where the answer stands; it and three
  numbers near it to choose from.
"""

import argparse
import json
import re
from pathlib import Path
from random import Random
from typing import Any

from peers import CALIBRATION_SEED, self_written

#: Rows that `srcr search` takes besides those that calibrate.
SEARCHED = 12 + 64 + 64
#: Solved examples before a question: at most so many, of together at most so many characters.
SHOTS, SHOWN = 3, 250
#: Answers of tasks that list no options.
WORDS = {
    "boolean_expressions": ["True", "False"],
    "navigate": ["Yes", "No"],
    "web_of_lies": ["Yes", "No"],
}
CHOICES = 4
GENERATED_TOKENS = 160


def write_first(rows: Path, samples: int, out: Path) -> None:
    """Write the first `samples` rows of a file as one of their own."""
    from safetensors.torch import load_file, save_file

    save_file({"input_ids": load_file(rows)["input_ids"][:samples].contiguous()}, out)


def write_rows(model: str, text: Path, samples: int, length: int, out: Path) -> None:
    """Write the first `samples` rows of `length` tokens of a text, each begun as the tokenizer begins one."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    start = tokenizer("")["input_ids"]
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    step = length - len(start)
    rows = [start + ids[i : i + step] for i in range(0, samples * step, step)]
    if len(rows[-1]) < length:
        raise SystemExit(f"{text} has {len(ids)} tokens, too few for {samples} x {length}")
    save_file({"input_ids": torch.tensor(rows)}, out)


def blimp(folder: Path, count: int) -> list[dict[str, Any]]:
    """Pairs of sentences, the good one first."""
    items = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:count]:
            row = json.loads(line)
            choices = [row["sentence_good"], row["sentence_bad"]]
            items.append({"prompt": "", "choices": choices, "answer": 0})
    return items


def bbh(path: Path, count: int) -> list[dict[str, Any]]:
    """Questions of one task behind its first examples."""
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    targets = sorted({example["target"] for example in examples})
    shown = ""
    for example in examples[:SHOTS]:
        choices, right = options(path.stem, example, targets, 0)
        solved = f"Q: {example['input']}\nA:{choices[right]}\n\n"
        shown += solved if len(shown + solved) <= SHOWN else ""
    items = []
    for number, example in enumerate(examples[SHOTS : SHOTS + count]):
        choices, right = options(path.stem, example, targets, number)
        prompt = f"{shown}Q: {example['input']}\nA:"
        items.append({"prompt": prompt, "choices": choices, "answer": right})
    return items


def options(
    task: str, example: dict[str, str], targets: list[str], seed: int
) -> tuple[list[str], int]:
    """The choices of an example, each with a space before it, and the number of the right one."""
    listed = re.findall(r"^(\([A-Z]\)) (.+)$", example["input"], re.M)
    if listed:
        return [f" {text}" for _, text in listed], [k for k, _ in listed].index(example["target"])
    words = WORDS.get(task)
    if words is None:
        others = [target for target in targets if target != example["target"]]
        words = [example["target"], *Random(seed).sample(others, CHOICES - 1)]
    return [f" {word}" for word in words], words.index(example["target"])


def gsm8k(path: Path) -> list[dict[str, Any]]:
    """Questions with their solution, without the calculator's marks, and its number."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    items = []
    for row in rows:
        solution, _, answer = re.sub(r"<<.*?>>", "", row["answer"]).partition("\n#### ")
        items.append({"question": row["question"], "solution": solution, "answer": answer.strip()})
    return items


def last_steps(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The last number of each solution, to be chosen among four."""
    steps: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        places = list(
            re.finditer(rf"(?<![\d.,]){re.escape(item['answer'])}(?![\d,])", item["solution"])
        )
        if not places or not item["answer"].isdigit():
            continue
        right = int(item["answer"])
        near = [right + d for d in (-20, -10, -5, -2, -1, 1, 2, 5, 10, 20) if right + d > 0]
        numbers = [right, *Random(number).sample(near, CHOICES - 1)]
        prompt = f"Question: {item['question']}\nAnswer: {item['solution'][: places[-1].start()]}"
        steps.append({"prompt": prompt, "choices": [str(n) for n in numbers], "answer": 0})
        if len(steps) == count:
            break
    return steps


def generated(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Questions behind three solved ones."""
    shown = "".join(
        f"Question: {i['question']}\nAnswer: {i['solution']}\n#### {i['answer']}\n\n"
        for i in items[:SHOTS]
    )
    return [
        {"prompt": f"{shown}Question: {i['question']}\nAnswer:", "answer": f"#### {i['answer']}"}
        for i in items[SHOTS : SHOTS + count]
    ]


def write_task(folder: Path, name: str, items: list[dict[str, Any]]) -> None:
    """A task file of the harness and its data."""
    import yaml

    data = folder.resolve() / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(item)}\n" for item in items), encoding="utf-8")
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    task: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",  # choices begin with their space
    }
    if "choices" in items[0]:
        task |= {"output_type": "multiple_choice", "doc_to_choice": "choices"}
        task |= {"doc_to_target": "answer", "metric_list": [metric]}
    else:
        answer = {"function": "regex", "regex_pattern": r"(#### -?[\d.,]*\d)"}
        ends = {"until": ["Question:", "\n\n"], "max_gen_toks": GENERATED_TOKENS}
        task |= {"output_type": "generate_until", "doc_to_target": "{{answer}}"}
        task |= {"generation_kwargs": ends | {"do_sample": False}}
        task |= {"metric_list": [metric | {"metric": "exact_match"}]}
        task |= {
            "filter_list": [{"name": "strict", "filter": [answer, {"function": "take_first"}]}]
        }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def write_tasks(shared: Path, folder: Path, args: argparse.Namespace) -> None:
    """Every task that has items."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = gsm8k(shared / "gsm8k_test.jsonl")
    tasks = {"blimp": blimp(shared / "blimp", args.blimp)}
    for path in sorted((shared / "bbh").glob("*.json")):
        tasks[f"bbh_{path.stem}"] = bbh(path, args.bbh)
    tasks["gsm8k_last_step"] = last_steps(problems, args.gsm8k_steps)
    tasks["gsm8k"] = generated(problems, args.gsm8k)
    for name, items in tasks.items():
        if items:
            write_task(folder, name, items)


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("shared", type=Path, help="folder of the texts and tasks")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", choices=["text", "self"], default="text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--blimp", type=int, default=12, help="pairs a paradigm")
    parser.add_argument("--bbh", type=int, default=30, help="items a task")
    parser.add_argument("--gsm8k-steps", type=int, default=30)
    parser.add_argument("--gsm8k", type=int, default=10)
    args = parser.parse_args()
    write_tasks(args.shared, args.out / "tasks", args)
    rows, out = args.samples + SEARCHED, args.out / "search.safetensors"
    if args.calibration == "self":
        self_written(args.model, rows, args.seq_len, CALIBRATION_SEED, out)
    else:
        write_rows(args.model, args.shared / "wikitext2_valid.txt", rows, args.seq_len, out)
    write_first(out, args.samples, args.out / "calibration.safetensors")


if __name__ == "__main__":
    main()
