"""export(): a compressed model in another format."""

import time
from dataclasses import replace
from pathlib import Path

from srcr.environment import peak_memory, versions
from srcr.errors import InputError
from srcr.formats import Format, detect, get_format
from srcr.formats.checkpoint import Checkpoint
from srcr.formats.verify import verify_tensors
from srcr.models.load import resolve
from srcr.pipelines.folder import read_records, write_records
from srcr.pipelines.options import Output, RunOptions
from srcr.pipelines.progress import stage
from srcr.records.run import RunRecord
from srcr.storage.atomic import atomic_output, check_output
from srcr.storage.index import file_bytes
from srcr.storage.layout import PLAN


def export(model: str | Path, output: Output, options: RunOptions = RunOptions()) -> RunRecord:
    """Write the compressed model in the folder (or hub id) ``model`` to ``output.path`` in the format
    ``output.format``: the same weights, in other files. They are read back before the folder appears.

    Returns the record of the compression, with the format and bytes of now, which is also written there.

    Raises:
        InputError: no format is named, ``model`` was not compressed by srcr, or the format cannot hold what
            it holds.
        SrcrError: the disk refuses.
        VerificationError: what was written does not read back.

    >>> export("small", Output("small-dense", format="dense")).format
    'dense'
    """
    started = time.monotonic()
    if output.format is None:
        raise InputError("an export needs a format to convert to: --format dense, for example")
    fmt, folder = get_format(output.format), resolve(model)
    check_output(output.folder, folder, output.overwrite)
    record, plan = read_records(folder)
    with stage("read", 1, options.quiet) as bar:
        checkpoint = detect(folder).read(folder)
        bar.note(str(model), advance=1)
    _check(fmt, checkpoint, record, str(model))
    with (
        atomic_output(output.folder, folder, output.overwrite) as journal,
        stage("write", 2, options.quiet) as bar,
    ):
        bar.note("weights")
        fmt.write(checkpoint, journal.folder)
        bar.note("verify", advance=1)
        verify_tensors(fmt, checkpoint, journal.folder)
        loaded = fmt.loaded_bytes(journal.folder, checkpoint.contents)
        exported = replace(
            record,
            command=options.command,
            format=fmt.name,
            rates=replace(
                record.rates,
                stored_bytes=file_bytes(journal.folder),
                loaded_bytes=loaded.n_bytes,
                engine=loaded.engine,
            ),
            versions=versions(),
            seconds=round(time.monotonic() - started, 3),
            peak_memory_bytes=peak_memory(),
            verification=None,
            loader=fmt.loader(checkpoint.contents),
            notes=(*record.notes, f"exported from {record.format}"),
        )
        exported = write_records(journal.folder, exported, plan)
        bar.note("done", advance=1)
    return exported


def _check(fmt: Format, checkpoint: Checkpoint, record: RunRecord, model: str) -> None:
    """Refuse what the format cannot hold.

    Raises:
        InputError: says why; of a dense checkpoint, that its codes are gone.
    """
    quantized = any(layer.bits < 16 for layer in record.layers)
    if quantized and not checkpoint.contents.schemes and fmt.name != record.format:
        raise InputError(
            f"{model} is a {record.format} checkpoint, which holds weights but no codes: compress the base "
            f"again with --plan {PLAN} --format {fmt.name}"
        )
    for layer in record.layers:
        scheme = checkpoint.contents.schemes.get(layer.name)
        bits = layer.bits if scheme is None else scheme.num_bits
        if bits != layer.bits and fmt.name not in (record.format, "dense"):
            raise InputError(
                f"{model} stores the {layer.bits}-bit codes of {layer.name} in {bits} bits: export the "
                "checkpoint that it came from, or compress the base again with its plan"
            )
    fmt.check(checkpoint.contents)
