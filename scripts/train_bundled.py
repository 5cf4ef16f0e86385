"""Train the bundled tokenizer and model from nothing but the seeded grammar.

    python scripts/train_bundled.py                 # about a quarter of an hour on two quiet cores
    python scripts/train_bundled.py --steps 20 --items 50 --work build/try --out build/try/model

The same command continues an interrupted run from the checkpoint in the work folder. The batch of
a step depends on the number of the step alone, so a continued run ends with the same weights.
"""

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Idle threads must not hold a busy core.

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srcr.bundled import chance, model_path, tasks, texts
from srcr.bundled.scoring import score

VOCABULARY = 1024
CONTEXT = 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPLIT_PATTERN = r" ?[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]|\s+"
SEQUENCES, LENGTH = 8, 256
ANSWER_MARKERS, ANSWER_WEIGHT = ("Ġ=", "Ġis", "?", "Ġin", "Ġlikes", "Ġas", "Ġkeeps"), 5.0
PEAK_RATE, WARM_UP, DECAY = 2e-3, 100, 120
BITS = (16, 4, 3, 2)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training texts; every digit is a token of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(20_000, seed=-1, split="train"), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the configs of all models of the bundled language have in common."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.04,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "use_cache": False,
    }


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(**sizes(tokenizer), num_hidden_layers=8, attn_implementation="sdpa")
    return LlamaForCausalLM(config)


def batch(step: int, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Packed documents, each between a BOS and an EOS, for one step."""
    ids: list[int] = []
    for document in _documents(step):
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= SEQUENCES * LENGTH:
            break
    return torch.tensor(ids[: SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)


def _documents(step: int) -> Iterator[str]:
    part = 0
    while True:
        yield from texts(32, seed=step * 1000 + part, split="train")
        part += 1


def rate(step: int, steps: int) -> float:
    """Linear warm-up, a constant rate, and a linear decay to zero over the last `DECAY` steps."""
    decay = steps - decay_start(steps)
    return PEAK_RATE * min(1, (step + 1) / WARM_UP, (steps - step) / decay)


def decay_start(steps: int) -> int:
    """The step up to which all longer runs are the same."""
    return steps - max(1, min(DECAY, steps // 3))


def new_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9, fused=True)


def step_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, markers: torch.Tensor, weight: float
) -> torch.Tensor:
    """The mean loss of predicting each next token, the two after a marker with more weight."""
    logits = model(input_ids=ids[:, :-1]).logits
    losses = cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    marked = torch.isin(ids[:, :-1], markers)
    marked[:, 1:] |= marked[:, :-1].clone()
    weights = 1 + (weight - 1) * marked
    return (losses * weights).sum() / weights.sum()


def accuracies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, first: int | None = None
) -> dict[str, float]:
    """The accuracy on each task set, or on about `first` items spread over each."""
    result = {}
    for name, items in tasks().items():
        part = items[:: max(1, len(items) // first)] if first else items
        result[name] = sum(score(model, tokenizer, part)) / len(part)
    return result


@torch.no_grad()
def round_to_nearest(model: LlamaForCausalLM, bits: int) -> None:
    """Round the linears of all blocks to symmetric integers, one absmax scale per output."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.float()
            most = 2 ** (bits - 1) - 1
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / most
            module.weight.copy_((weight / scale).round().clamp(-most, most) * scale)


def evaluate(folder: Path, device: str, first: int | None) -> dict[str, Any]:
    """Accuracies of a stored model as it is and with its blocks rounded to few bits."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rounded: dict[str, dict[str, float]] = {}
    for bits in BITS:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        if bits < 16:
            round_to_nearest(model, bits)
        shares = accuracies(model, tokenizer, first)
        rounded[str(bits)] = {name: round(value, 4) for name, value in shares.items()}
        print(f"{bits:2d} bits: {_shown(shares)}", flush=True)
    return rounded


def _shown(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model, rounded to bfloat16, with its tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.config.use_cache = True
    stored.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_length=CONTEXT,
    )
    stored.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(options: argparse.Namespace) -> None:
    """Train from the checkpoint, if there is one, to the last step; then save and evaluate."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer).to(device)
    optimizer = new_optimizer(model)
    markers = torch.tensor(tokenizer.convert_tokens_to_ids(list(ANSWER_MARKERS)), device=device)
    checkpoint = work / "checkpoint.pt"
    done, spent, losses = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["steps"] != options.steps and state["done"] > min(
            decay_start(state["steps"]), decay_start(options.steps)
        ):
            raise SystemExit(f"{checkpoint} belongs to a run of {state['steps']} steps")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, spent, losses = state["done"], state["seconds"], state["losses"]
        print(f"continuing after step {done}", flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters on {device}", flush=True)

    started = time.perf_counter() - spent
    reported = saved = time.perf_counter()
    last = min(options.steps, options.stop_after or options.steps)
    cast = torch.autocast(device, torch.bfloat16) if options.bfloat16 else contextlib.nullcontext()

    def keep() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "done": done,
            "steps": options.steps,
            "seconds": time.perf_counter() - started,
            "losses": losses,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    model.train()
    while done < last:
        for group in optimizer.param_groups:
            group["lr"] = rate(done, options.steps)
        with cast:
            loss = step_loss(model, batch(done, tokenizer).to(device), markers, ANSWER_WEIGHT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        losses = [*losses, loss.item()][-100:]
        now = time.perf_counter()
        if done % 20 == 0:
            each = (now - started) / done
            print(
                f"step {done}/{options.steps}  loss {sum(losses[-20:]) / 20:.3f}  "
                f"{SEQUENCES * LENGTH / each:.0f} tokens/s  "
                f"{each * (options.steps - done) / 60:.1f} min left",
                flush=True,
            )
        if now - reported > options.report:
            print(f"step {done}  {_shown(accuracies(model, tokenizer, 100))}", flush=True)
            reported = time.perf_counter()
        if now - saved > options.report:
            keep()
            saved = time.perf_counter()
    keep()
    if done < options.steps:
        return

    seconds = time.perf_counter() - started
    save(model, tokenizer, options.out)
    figures = {
        "parameters": parameters,
        "steps": options.steps,
        "tokens": options.steps * SEQUENCES * LENGTH,
        "seconds": round(seconds),
        "device": device,
        "loss": round(sum(losses) / len(losses), 4),
        "chance": {name: round(chance(name), 4) for name in tasks()},
        "accuracy_by_bits": evaluate(options.out, device, options.items),
    }
    (options.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--steps", type=int, default=1926)
    parser.add_argument("--stop-after", type=int, help="leave a checkpoint after this step")
    parser.add_argument("--work", type=Path, default=Path("build/bundled"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=model_path(), help="the final model folder")
    parser.add_argument("--items", type=int, help="evaluate on about so many items of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=float, default=120, help="seconds between reports")
    parser.add_argument(
        "--bfloat16", action="store_true", help="autocast; only faster where the hardware has it"
    )
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
