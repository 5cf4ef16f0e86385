"""What a byte is worth: KL against the bytes of an archive, pruned and quantized against quantized alone.

    python benchmarks/archive.py MODEL -o WORK [--configs 4,0.25+4,3] [--calibration SOURCE] [--text SOURCE]
        [--samples 128] [--eval-samples 64] [--seq-len 256] [--group-size -1] [--threads 2]

Each configuration ("BITS" or "SPARSITY+BITS", symmetric) is compressed into an archive and evaluated. What
lies in WORK already is not made again. Prints a Markdown table: the archive's bytes, the bits that a weight
of the blocks' linears takes in it (codes and scales), the entropy of the codes, KL, and what bits alone would
have at the same bits a weight, on the line between their two neighbours (logarithm of KL against bits). Times
are those of packing and unpacking all, on one thread, as megabytes of 16-bit weights a second.
"""

import argparse
import math
import os
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch

import srcr
from recover import recipe_of
from srcr.formats import get_format
from srcr.formats.archive.container import ArchiveFile
from srcr.numerics.coding import decode_symbols, encode_symbols
from srcr.records.run import RunRecord
from srcr.storage.layout import ARCHIVE


def coded_bits(folder: Path, record: RunRecord) -> float:
    """Bits a weight of the compressed linears in an archive, scales included."""
    archive = ArchiveFile(folder / ARCHIVE)
    total = sum(len(archive.read(layer.name).payload) for layer in record.layers)
    return 8 * total / sum(math.prod(layer.shape) for layer in record.layers)


def speeds(folder: Path) -> tuple[float, float]:
    """Megabytes of 16-bit weights that are packed, and unpacked, in a second on one thread."""
    checkpoint = get_format("archive").read(folder)
    threads, size, packing, unpacking = torch.get_num_threads(), 0, 0.0, 0.0
    torch.set_num_threads(1)
    for name in checkpoint.contents.compressed[:40]:
        codes = checkpoint.read(name).codes
        symbols = (codes.to(torch.int16) + 128).to(torch.uint8).numpy()
        started = time.perf_counter()
        data = encode_symbols(symbols)
        packed = time.perf_counter()
        decode_symbols(data, symbols.shape)
        unpacking += time.perf_counter() - packed
        packing += packed - started
        size += 2 * symbols.size
    torch.set_num_threads(threads)
    return size / 1e6 / packing, size / 1e6 / unpacking


def at_equal_bits(alone: list[tuple[float, float]], bits: float) -> float:
    """The KL of bits alone at so many bits a weight."""
    below = max((pair for pair in alone if pair[0] <= bits), default=None)
    above = min((pair for pair in alone if pair[0] >= bits), default=None)
    if below is None or above is None:
        return math.nan
    if below[0] == above[0]:
        return below[1]
    share = (bits - below[0]) / (above[0] - below[0])
    return below[1] ** (1 - share) * above[1] ** share


def main() -> None:
    """Compress, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--work", type=Path, required=True)
    parser.add_argument("--configs", default="4,0.25+4,3,0.2+5,0.5+4,2")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--text", default="self")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--eval-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=-1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet, rows = srcr.RunOptions(0, quiet=True), []
    calibration = srcr.Calibration(options.calibration, options.samples, options.seq_len)
    text = srcr.EvaluationText(options.text, options.eval_samples, options.seq_len)
    for name in options.configs.split(","):
        output = srcr.Output(options.work / name, format="archive", resume=True)
        recipe = recipe_of(name, options.group_size)
        record = srcr.compress(options.model, output, recipe, calibration, quiet)
        [result] = srcr.evaluate(options.model, [output.folder], text, options=quiet)
        bits = coded_bits(output.folder, record)
        rows.append((name, record, bits, result.divergence.kl))
        print(f"{name}: {bits:.3f} bits, KL {result.divergence.kl.value:.4f}", flush=True)
    alone = [(bits, kl.value) for name, _, bits, kl in rows if "+" not in name]
    print(
        "| configuration | TCr | archive | bits a weight | entropy | KL | bits alone there | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, record, bits, kl in rows:
        rates, there = record.rates, at_equal_bits(alone, bits)
        print(
            f"| {name} | {rates.tcr:.4f} | {rates.stored_bytes / 1e6:.2f} MB | {bits:.3f} | "
            f"{rates.entropy_bits:.3f} | {kl.value:.4f} [{kl.ci95[0]:.4f}, {kl.ci95[1]:.4f}] | "
            f"{there:.4f} | {kl.value / there:.2f} |"
        )
    packing, unpacking = speeds(options.work / options.configs.split(",")[0])
    print(
        f"\npacking {packing:.0f} MB/s, unpacking {unpacking:.0f} MB/s of 16-bit weights, one thread"
    )


if __name__ == "__main__":
    main()
