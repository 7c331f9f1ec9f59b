"""Tensors from files nobody vouches for, writing without a loss, and one run a folder."""

import errno
import os
import sys
from pathlib import Path

import torch

from ..data.errors import InputError, input_errors, write_errors

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # what fsync answers where there is none


def read_tensors(path):
    """Whatever a PyTorch file holds, loaded without running its code. Raises InputError."""
    if not Path(path).exists():
        raise InputError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler answers damaged bytes with almost any, and some advise to run the code
        fault = f"damaged, a pointer of Git LFS, or it carries code: {type(error).__name__}"
        raise InputError(f"{path}: refused: not a file of plain tensors ({fault})") from None


def write_whole(path, write):
    """Let `write` fill a file that is replaced in one step, so a crash or a full disk leaves the previous one whole.
    Raises InputError. What is no file but a device or a pipe is written to as it is."""
    real = Path(path).resolve()  # a link stays one
    special = os.path.exists(path) and not os.path.isfile(path)
    temporary = Path(path) if special else real.with_name(real.name + ".tmp")
    with input_errors(path, "cannot be written", "what stood there before is untouched", (OSError, RuntimeError)):
        try:
            with open(temporary, "wb") as file:
                write(file)
                sync(file)
            if not special:
                os.replace(temporary, real)
        finally:
            if not special:
                temporary.unlink(missing_ok=True)


def open_locked(path):
    """A run's file opened for appending, and locked until this process ends, however it ends.

    Read it through what is returned only: opening and closing it once more in this process would release the lock.
    Raises InputError if another process has it locked, or if it cannot be written. On Windows nothing is locked.
    """
    mend = "choose another --out"
    with write_errors(path, mend):
        file = open(path, "a+b")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{path.parent}: in use by another run; {mend}") from None
    except OSError as error:  # of some network drives
        print(f"warning: {path.parent}: no locks there ({error.strerror}): start no second run there", file=sys.stderr)
    return file


def sync(file):
    """Have what was written to a file on the disk, where the file system can say so."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
