"""Tensors from files nobody vouches for: loaded without running code, and every one of them accounted for."""

import contextlib
import pickle
from collections import Counter
from typing import NamedTuple

import torch

from .annotations import InputError


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


@contextlib.contextmanager
def blamed(path, fault="a damaged checkpoint"):
    """What goes wrong with values that were read from a file is that file's fault: InputError, one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: {fault} ({type(error).__name__}: {reason})") from None


class Expected(NamedTuple):
    """A tensor that a file should hold."""

    shape: tuple
    ours: str  # its name here
    dropped: str = ""  # why it is not used, or empty


def take(state, expected, source):
    """{our name: tensor} of what is used, and a line that accounts for every tensor of `state`.

    Raises InputError with the first tensor that is missing, unknown or of a wrong shape. Only BatchNorm's counters,
    which nothing reads, may be missing: PyTorch did not always write them.
    """
    faults = [f"{n} is missing" for n in expected if n not in state and not n.endswith(".num_batches_tracked")]
    faults += [f"{n} is unknown" for n in state if n not in expected]
    shapes = {n: (shape_of(tensor), expected[n].shape) for n, tensor in state.items() if n in expected}
    faults += [f"{n} is {shape}, must be {wanted}" for n, (shape, wanted) in shapes.items() if shape != wanted]
    if faults:
        more = f" ({len(faults) - 1} more do not fit)" if faults[1:] else ""
        raise InputError(f"{source}: tensor {faults[0]}{more}")
    used = {expected[n].ours: tensor for n, tensor in state.items() if not expected[n].dropped}
    dropped = Counter(expected[n].dropped for n in state if expected[n].dropped)
    counts = ", ".join(f"{count} ({why})" for why, count in dropped.items()) or "none"
    return used, f"{source}: {len(used)} tensors used; dropped: {counts}"


def shape_of(value):
    return tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
