"""Models to files and back. A checkpoint is plain tensors, numbers and text, so it loads without running any code.

    {"msad": 1, "config": the ModelConfig's fields, "model": state dict, "training": what a run needs to go on}
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch

from . import official, processes
from .annotations import InputError
from .detector import ModelConfig
from .models import build
from .tensors import blamed, read_tensors

FORMAT = 1


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


def read(path, want=None):
    """A checkpoint's content, with "config" as a ModelConfig. Raises InputError.

    A file of the authors' gives the same, and "summary", a line that accounts for its tensors; of one of their
    students, which holds its teacher too, `want="teacher"` gives that.
    """
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("msad") != FORMAT:
        return official.translate(content, path, want)
    with blamed(path):
        return content | {"config": ModelConfig(**content["config"])}


def restore(content, path):
    """The model of a checkpoint's content, in eval mode. Raises InputError where the tensors do not fit it."""
    with blamed(path, "its tensors do not fit its description"):
        model = build(content["config"])
        model.load_state_dict(content["model"])
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


def load_teacher(path, device="cpu"):
    """As `load`, of a file that has to hold a teacher."""
    model = load(path, device, want="teacher")
    if model.config.kind != "teacher":
        raise InputError(f"{path}: holds a model of kind {model.config.kind}, not a teacher")
    return model
