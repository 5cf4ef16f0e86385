"""The command as a program: errors become one clear line and an exit code, and the process is made fast."""

import atexit
import ctypes
import errno
import gc
import os
import sys
from contextlib import suppress

import srcr.cli.commands
import srcr.cli.push_command
import srcr.cli.recover_command
import srcr.cli.search_commands  # noqa: F401 - registers its commands
from srcr.cli.app import app, fail, fail_interrupted
from srcr.errors import SrcrError

#: Bytes that are worth a call of the system: twice what is worked on at a time
#: (``srcr.numerics.tensors.CHUNK_ELEMENTS``).
LARGE = 1 << 24
#: Free bytes that may stay at the end of the heap for what comes next, until a step gives them back.
NEXT = 1 << 28
#: How often a thread of OpenMP looks for others before it sleeps: about as long as waking it takes.
SPINS = 1000
#: Their numbers in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def main() -> None:
    """Run the command that ``sys.argv`` names.

    Raises:
        SystemExit: always; with 0 where it is done, 2 for bad usage or input, 130 where the user
            interrupts, 1 where it failed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars; srcr shows its own
    try:
        app()
    except SrcrError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        fail_interrupted(error)
    except (OSError, MemoryError) as error:
        named = isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        fail(str(error) or type(error).__name__, 2 if named else 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be imported here
            raise
        fail(f"{error}; use fewer --samples, a shorter --seq-len, or --device cpu", 1)


def start() -> None:
    """The command as a process of its own: :func:`main`, without the cost of garbage collection.

    Importing torch and transformers makes some hundred thousand objects that live to the end. Looking
    through them again and again takes seconds and frees nothing, and so does taking them apart at the exit.
    """
    gc.set_threshold(1_000_000, 50, 50)
    _tune_allocator()
    _tune_openmp()
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


def _tune_allocator() -> None:
    """From now on glibc gives back to the system what is larger than ``LARGE`` as soon as it is free. It
    would keep up to 32 MB a piece for later, among which what stays in use leaves holes: after some blocks of
    a large model, hundreds of megabytes. What is free at the end of the heap it keeps, up to ``NEXT``:
    activations come and go there, and the system would clear the same pages over and over."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, LARGE)
            libc.mallopt(M_TRIM_THRESHOLD, NEXT)


def _tune_openmp() -> None:
    """Let threads that wait for others sleep soon, unless the user has said how they wait. GNU's OpenMP,
    which reads it when torch is loaded, would have them look for some milliseconds: on a machine that has
    other work, they keep those from running that they wait for."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
