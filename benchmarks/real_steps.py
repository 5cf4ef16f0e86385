"""The steps of `real.py`: every configuration that is compressed, by whom, and the command that does it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers import PEERS

#: Environment that keeps torch and its libraries, and the kernels that Numba compiles, to an older CPU's
#: instructions.
ISA: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",  # which alone leaves all features of the CPU on
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2",
    },
}
TITLES = {
    "srcr": "srcr",
    "search": "srcr",
    "llmcompressor": "llm-compressor",
    "autoround": "AutoRound",
    "gptqmodel": "GPTQModel",
}
MODES = {"joint": "", "sequential-a": "sequential A", "sequential-b": "sequential B"}


@dataclass(frozen=True)
class Step:
    """One configuration: made by `side` (srcr, search, or a peer), with a sparsity and bits, or a TCr to
    search for. `group` numbers the evaluation that it is part of."""

    side: str
    sparsity: float
    bits: int
    mode: str = "joint"
    target: float | None = None
    group: int = 0

    @property
    def tcr(self) -> float:
        """The theoretical compression rate that is asked for."""
        if self.target is not None:
            return self.target
        return round(1 - (1 - self.sparsity) * self.bits / 16, 9)

    @property
    def name(self) -> str:
        """Its file, its folder, and its name on the command line."""
        if self.target is not None:
            return f"search-{100 * self.target:g}"
        share = f"{100 * self.sparsity:.3g}+" if self.sparsity else ""
        mode = "" if self.mode == "joint" else f"-{self.mode[-1]}"
        return f"{self.side}-{share}{self.bits}b{mode}"

    @property
    def label(self) -> str:
        """For tables."""
        if self.target is not None:
            return "searched"
        share = f"{100 * self.sparsity:.3g} % + " if self.sparsity else ""
        mode = f", {MODES[self.mode]}" if MODES[self.mode] else ""
        return f"{share}{self.bits} bits{mode}"


JOINT = ((0.2, 5), (1 / 3, 3), (0.5, 4))


def plan(peers: Sequence[str]) -> list[Step]:
    """All steps, what matters most first; of the peers those that are named."""
    steps = [Step("srcr", 0, 4), Step("srcr", 0, 3), Step("srcr", 0.25, 4)]
    steps += [Step("llmcompressor", s, b, group=1) for s, b in ((0, 4), (0, 3), (0.25, 4))]
    steps += [Step(p, 0, b, group=2) for p in ("autoround", "gptqmodel") for b in (4, 3)]
    steps += [Step("srcr", s, b, group=3) for s, b in JOINT]
    for group, mode in ((4, "sequential-a"), (5, "sequential-b")):
        steps += [Step("srcr", s, b, mode, group=group) for s, b in ((0.25, 4), *JOINT)]
    steps += [Step("srcr", 0, 2, group=6)]
    steps += [Step("search", 0, 0, target=t, group=7) for t in (0.8125, 0.75, 0.875)]
    return [step for step in steps if step.side not in PEERS or step.side in peers]


@dataclass(frozen=True)
class Inputs:
    """What every step is given: the model, the folder of tokens, how many calibrate, the folder of the peers'
    environments, and the effort of the search and of AutoRound."""

    model: str
    data: Path
    samples: int
    seq_len: int
    peers: Path
    trials: int
    steps: int
    threads: int


def command(step: Step, inputs: Inputs, out: Path) -> list[str]:
    """How the step is run."""
    file = "calibration" if step.target is None else "search"  # the latter begins with the former
    tokens = ["--calibration", str(inputs.data / f"{file}.safetensors")]
    if step.side in PEERS:
        python = str(inputs.peers / step.side / "bin" / "python")
        line = [python, str(PEERS[step.side]), inputs.model, "--out", str(out), *tokens]
        line += ["--sparsity", str(step.sparsity), "--bits", str(step.bits)]
        line += ["--threads", str(inputs.threads)]
        if step.side == "llmcompressor":
            line += ["--batch-size", "16"]
        return [*line, "--steps", str(inputs.steps)] if step.side == "autoround" else line
    same = ["-o", str(out), "--group-size", "-1", *tokens, "--overwrite", "--json"]
    same += ["--samples", str(inputs.samples), "--seq-len", str(inputs.seq_len)]
    if step.target is None:
        how = ["--sparsity", str(step.sparsity), "--bits", str(step.bits), "--mode", step.mode]
    else:
        how = ["--target", f"tcr={step.target}", "--trials", str(inputs.trials)]
        how += ["--database", str(out.parent / "levels")]  # searches share levels
    verb = "compress" if step.target is None else "search"
    return [sys.executable, "-m", "srcr", verb, inputs.model, *how, *same]
