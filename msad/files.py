"""Files: what the user gave and cannot be used, tensors nobody vouches for, and writing without a loss."""

import contextlib
import os
import pickle
from pathlib import Path

import torch


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line that names it and the mend."""


def read_tensors(path):
    """Whatever a PyTorch file holds, loaded without running its code. Raises InputError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError:
        raise InputError(f"{path}: refused: not a file of plain tensors (damaged, or it carries code)") from None
    except Exception as error:  # the unpickler answers damaged bytes with almost any exception
        raise InputError(f"{path}: not a PyTorch file, or damaged ({type(error).__name__})") from None


def write_tensors(path, content):
    """Save to a file that is replaced in one step, so a crash or a full disk leaves the previous one whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); what stood there before is untouched") from None


@contextlib.contextmanager
def blamed(path, fault="a damaged checkpoint"):
    """What goes wrong with values that were read from a file is that file's fault: InputError, one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: {fault} ({type(error).__name__}: {reason})") from None


@contextlib.contextmanager
def writing(path, mend="choose another place"):
    """A failure to write what the user asked for is one line, an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {mend}") from None
