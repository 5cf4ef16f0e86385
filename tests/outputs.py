"""What runs have written, to be compared."""

import json

#: What the record says that differs from run to run.
OF_THE_RUN = ("command", "seconds", "peak_memory_bytes")


def files(folder):
    """What decides a checkpoint, byte by byte; and the record but for what differs from run to run."""
    data = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(data.pop("srcr.json"))
    for key in OF_THE_RUN:
        record.pop(key)
    data.pop("README.md")
    return data, record
