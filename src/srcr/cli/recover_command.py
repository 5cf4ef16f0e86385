"""The command that trains what was compressed."""

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from srcr.cli import parameters as given
from srcr.cli.app import Command, app, command_line, print_json


@app.command(cls=Command)
def recover(
    base: given.Base,
    compressed: Annotated[
        str, typer.Argument(help="The compressed version to train.", show_default=False)
    ],
    out: given.Out,
    stage: given.StageName = None,
    minutes: given.Minutes = None,
    steps: given.Steps = None,
    batch: given.BatchRows = None,
    train: given.Train = None,
    loss: given.Loss = None,
    lr: given.LearningRate = None,
    calibration: given.Sources = None,
    samples: given.RecoverySamples = None,
    seq_len: given.TextLength = 512,
    held_out: given.HeldOut = "self",
    processes: given.ProcessCount = 1,
    memory: given.Memory = None,
    resume: given.Resume = False,
    overwrite: given.Overwrite = False,
    seed: given.Seed = None,
    device: given.Device = None,
    cache: given.Cache = None,
    as_json: given.Json = False,
) -> None:
    """Repair a compressed model by distillation: same format, same zeros, same bits, same bytes."""
    arguments = locals()
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        _start(processes)
    from srcr.cli import tables
    from srcr.data.sources import RecoveryText
    from srcr.pipelines.options import Output, RunOptions
    from srcr.pipelines.recover import recover as run
    from srcr.serialize import to_dict

    text = RecoveryText(tuple(calibration or ("self",)), samples, seq_len, held_out)
    options = RunOptions(
        seed, device or "auto", memory, command=command_line(), cache=cache is not False
    )
    output = Output(out, None, overwrite, resume)
    record = run(base, compressed, output, _spec(arguments), text, options)
    if os.environ.get("RANK", "0") != "0":  # another process speaks
        return
    if as_json:
        print_json(to_dict(record) | {"out": str(out)})
    else:
        tables.recovery(record, out)


def _start(processes: int) -> NoReturn:
    """Run the same command in so many processes that train together, in place of this one."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    os.execv(sys.executable, [sys.executable, *command, "-m", "srcr", *sys.argv[1:]])


def _spec(arguments: dict[str, Any]) -> Any:
    """What the options say of training; ten minutes where they set no end."""
    from srcr.pipelines.recover import TEN_MINUTES
    from srcr.plans.recovery import RecoverySpec
    from srcr.serialize import from_dict

    names = ("stage", "minutes", "steps", "batch", "train", "loss", "lr")
    values = {name: arguments[name] for name in names if arguments[name] is not None}
    if not {"minutes", "steps"} & values.keys():
        values["minutes"] = TEN_MINUTES.minutes
    return from_dict(RecoverySpec, values, "the command line")
