"""Train a small natural-language Llama on text files, for measurements on a model that is not bundled.

    python benchmarks/train_reference.py -o build/reference --minutes 12 TEXT [TEXT ...]

About 5 million parameters (width 256, six blocks, grouped-query attention), a byte-level BPE tokenizer
of 2048 tokens trained on the same text, saved in bfloat16. The result stays out of the repository.
"""

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BATCH, LENGTH, VOCABULARY = 8, 256, 2048


def train_tokenizer(paths: list[Path]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the files."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train([str(path) for path in paths], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def main() -> None:
    """Train for the given minutes and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(options.texts)
    stream: list[int] = []
    for path in options.texts:
        stream.extend(tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    rows = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH).clone()
    rows[:, 0] = 0  # every row starts as a document does
    held, rows = rows[:16], rows[16:]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    started, spent, step = time.monotonic(), 0.0, 0
    limit = options.minutes * 60
    while spent < limit:
        for group in optimizer.param_groups:  # warm-up, then a linear decay over the time left
            group["lr"] = 3e-3 * min(1, (step + 1) / 50, 1.02 - spent / limit)
        ids = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, spent = step + 1, time.monotonic() - started
        if step % 20 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {spent:.0f} of {limit:.0f} s", flush=True)
    model.eval().to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    with torch.no_grad():
        loss = model.float()(held, labels=held).loss
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {step} steps, held-out loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
