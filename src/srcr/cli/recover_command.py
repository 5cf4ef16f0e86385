"""The command that trains what was compressed."""

import os
import sys
from typing import Any, NoReturn

from typing_extensions import Unpack

from srcr.cli.app import command, print_json, show_preview
from srcr.cli.recover_parameters import Recover, Spec
from srcr.errors import InputError


@command
def recover(**options: Unpack[Recover]) -> None:
    """Repair a compressed model by distillation: same format, same zeros, same bits, same bytes."""
    processes = options.get("processes", 1)
    if processes > 1 and not options.get("dry_run") and "WORLD_SIZE" not in os.environ:
        _start(processes)
    from srcr.cli import options as read
    from srcr.cli import tables
    from srcr.data.specs import RecoveryText
    from srcr.pipelines.recover import recover as run
    from srcr.serialize import to_dict

    asked = read.picked(options, "samples", "seq_len", "held_out", "chat", sources="calibration")
    asked["sources"] = tuple(asked.get("sources", RecoveryText.sources))
    text, spec = RecoveryText(**asked), recovery_spec(options)
    wanted = (
        options["base"], options["compressed"], read.output_of(options), spec, text,
        read.run_of(options),
    )  # fmt: skip
    if options.get("dry_run"):
        from srcr.pipelines.preview import preview_recovery

        show_preview(preview_recovery(*wanted), options.get("as_json"))
        return
    record = run(*wanted)
    if os.environ.get("RANK", "0") != "0":  # another process speaks
        return
    defaults = read.picked(to_dict(spec), *Spec.__annotations__) | {
        "calibration": list(text.sources), "seq_len": text.seq_len, "held_out": text.held_out,
    }  # fmt: skip
    read.write_run("recover", options, defaults)
    if options.get("as_json"):
        print_json(to_dict(record) | {"out": str(options["out"])})
    else:
        tables.recovery(record, options["out"])


def _start(processes: int) -> NoReturn:
    """Run the same command in so many processes that train together, in place of this one."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    os.execv(sys.executable, [sys.executable, *command, "-m", "srcr", *sys.argv[1:]])


def recovery_spec(options: Recover) -> Any:
    """What the options say of training; ten minutes where they set no end.

    Raises:
        InputError: they set two.
    """
    from srcr.cli.options import picked
    from srcr.plans.recovery import TEN_MINUTES, RecoverySpec
    from srcr.serialize import from_dict

    values = picked(options, *Spec.__annotations__)
    if {"minutes", "steps"} <= values.keys():
        raise InputError(
            f"--minutes {values['minutes']:g} and --steps {values['steps']} both end the training: give one"
        )
    if not {"minutes", "steps"} & values.keys():
        values["minutes"] = TEN_MINUTES.minutes
    return from_dict(RecoverySpec, values, "the command line")
