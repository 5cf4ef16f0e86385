"""The command that trains what was compressed."""

import os
import sys
from typing import Any, NoReturn

from srcr.cli import parameters as given
from srcr.cli import recover_parameters as training
from srcr.cli.app import Command, app, command_line, given_only, print_json, show_preview


@app.command(cls=Command)
def recover(
    base: given.Base,
    compressed: given.Candidate,
    out: given.Out,
    stage: training.StageName = None,
    minutes: training.Minutes = None,
    steps: training.Steps = None,
    batch: training.BatchRows = None,
    train: training.Train = None,
    loss: training.Loss = None,
    lr: training.LearningRate = None,
    calibration: training.Sources = None,
    samples: training.RecoverySamples = None,
    seq_len: given.TextLength = None,
    held_out: training.HeldOut = None,
    processes: training.ProcessCount = 1,
    memory: given.Memory = None,
    resume: given.Resume = False,
    overwrite: given.Overwrite = False,
    dry_run: given.DryRun = False,
    seed: given.Seed = None,
    device: given.Device = None,
    cache: given.Cache = None,
    as_json: given.Json = False,
) -> None:
    """Repair a compressed model by distillation: same format, same zeros, same bits, same bytes."""
    arguments = locals()
    if processes > 1 and not dry_run and "WORLD_SIZE" not in os.environ:
        _start(processes)
    from srcr.cli import tables
    from srcr.data.specs import RecoveryText
    from srcr.pipelines.options import Output, RunOptions
    from srcr.pipelines.recover import recover as run
    from srcr.serialize import to_dict

    asked = {
        "sources": tuple(calibration or ()) or None,
        "samples": samples,
        "seq_len": seq_len,
        "held_out": held_out,
    }
    text = RecoveryText(**given_only(asked))
    machine = {"seed": seed, "device": device, "memory": memory, "cache": cache}
    options = RunOptions(command=command_line(), **given_only(machine))
    output = Output(out, None, overwrite, resume)
    if dry_run:
        from srcr.pipelines.preview import preview_recovery

        wanted = preview_recovery(base, compressed, output, _spec(arguments), text, options)
        show_preview(wanted, as_json)
        return
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
    from srcr.plans.recovery import TEN_MINUTES, RecoverySpec
    from srcr.serialize import from_dict

    names = ("stage", "minutes", "steps", "batch", "train", "loss", "lr")
    values = given_only({name: arguments[name] for name in names})
    if not {"minutes", "steps"} & values.keys():
        values["minutes"] = TEN_MINUTES.minutes
    return from_dict(RecoverySpec, values, "the command line")
