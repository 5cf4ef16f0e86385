"""Train a small mixture of experts on the bundled language: what benchmarks/experts.py measures.

    python scripts/train_mixture.py --out build/mixture         # under an hour on two quiet cores
    python scripts/train_mixture.py --out build/try --steps 20

Eight experts, two of them for each token, in every layer, with a loss that balances their load. A run that
was cut off goes on from the checkpoint in its folder.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from srcr.bundled import model_path
from train_bundled import SEQUENCES, batch, new_optimizer, rate, sizes

EXPERTS, CHOSEN, UNITS, LAYERS = 8, 2, 192, 6
BALANCE = 0.01
KEPT_EVERY = 50


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """The untrained mixture."""
    config = Qwen3MoeConfig(
        **sizes(tokenizer),
        num_hidden_layers=LAYERS,
        moe_intermediate_size=UNITS,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=BALANCE,
    )
    return Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")


def train(options: argparse.Namespace) -> None:
    """Train from the checkpoint, if there is one, to the last step; then save."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path())
    model = new_model(tokenizer)
    optimizer = new_optimizer(model)
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "checkpoint.pt"
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, from step {done}", flush=True)
    began = time.perf_counter()
    model.train()
    while done < options.steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(done, options.steps)
        ids = batch(done, tokenizer)
        output = model(input_ids=ids, labels=ids, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        if done % KEPT_EVERY == 0 or done == options.steps:
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done,
            }  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            minutes = (time.perf_counter() - began) / 60
            print(f"step {done}  loss {output.loss.item():.3f}  {minutes:.1f} min", flush=True)
    model.config.use_cache = True
    model.eval().to(torch.bfloat16).save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")


def main() -> None:
    """Run by its options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500, help=f"of {SEQUENCES} sequences each")
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
