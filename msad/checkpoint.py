"""Models to files and back. A checkpoint is plain tensors, numbers and text, so it loads without running any code.

    {"msad": 1, "config": the ModelConfig's fields, "model": state dict, "training": what a run needs to go on}
"""

import contextlib
import os
import pickle
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from . import processes
from .annotations import InputError
from .detector import Detector, ModelConfig
from .teacher import MultiScale, Teacher

FORMAT = 1
KINDS = {"teacher": Teacher, "conventional": MultiScale, "high": Detector, "low": Detector}


def build(config):
    """A new model of a ModelConfig's kind, in channels_last layout."""
    return KINDS[config.kind](config).to(memory_format=torch.channels_last)


def save(path, model, training=None):
    """Write a checkpoint. The file is replaced in one step, so a crash or a full disk leaves the previous one whole."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    content = {"msad": FORMAT, "config": asdict(model.config), "model": model.state_dict(), "training": training}
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); what stood there before is untouched") from None


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
def blamed(path):
    """What goes wrong with values that were read from a file is that file's fault: InputError, one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: a damaged checkpoint ({type(error).__name__}: {reason})") from None


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


def read(path, want=None):
    """A checkpoint's content, with "config" as a ModelConfig. Raises InputError.

    A file of the authors' gives the same, and "summary", a line that accounts for its tensors; of one of their
    students, which holds its teacher too, `want="teacher"` gives that.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("msad") != FORMAT:
        from .official import translate  # here, because that file builds on this one

        return translate(content, path, want)
    try:
        return content | {"config": ModelConfig(**content["config"])}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: a damaged checkpoint ({error})") from None


def restore(content, path):
    """The model of a checkpoint's content, in eval mode. Raises InputError where the tensors do not fit it."""
    try:
        model = build(content["config"])
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its tensors do not fit its description: {reason[:300]}") from None
    return model.eval()


def restore_run(training, optimizer, path):
    """Bring an optimizer to its stored state -> iterations done, length of the log. Raises InputError."""
    with blamed(path):
        groups = optimizer.state_dict()["param_groups"]  # these follow from the settings
        optimizer.load_state_dict({"state": training["optimizer"]["state"], "param_groups": groups})
        names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
        for p, state in optimizer.state.items():
            shapes = {name: value.shape for name, value in state.items()}
            if shapes != {name: () if name == "step" else p.shape for name in names}:
                raise ValueError(f"the optimizer's state of a parameter {tuple(p.shape)} is {shapes}")
        done, length = training["done"], training["log"]
        if not (type(done) is type(length) is int and min(done, length) >= 0):
            raise ValueError(f"done {done!r}, log {length!r}")
    return done, length


def load(path, device="cpu", want=None):
    """The model in a checkpoint or in a file of the authors', ready to `detect`. `want` is as in `read`.

    Of the authors' files it prints how their tensors were used. Raises InputError.
    """
    content = read(path, want)
    if "summary" in content and processes.is_main():
        print(f"weights   {content['summary']}", flush=True)
    return restore(content, path).to(device)
