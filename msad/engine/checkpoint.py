"""Models to files and back.

A checkpoint is plain tensors, numbers and text, so it loads without running any code:

    {"msad": 1, "config": the ModelConfig's fields, "model": state dict, "training": what a run needs to go on, or None}
"""

from dataclasses import asdict

import torch

from ..data.errors import InputError, checkpoint_errors
from ..models import ModelConfig, build
from .files import read_tensors, write_whole

FORMAT = 1
CONVERT = "a detector of the paper's authors is converted by python -m msad.engine.authors THEIRS.pth OURS.pt"


def save(path, model, training=None):
    """Write a checkpoint of a model, not of its folded copy. Raises InputError; what stood there is then untouched."""
    content = {"msad": FORMAT, "config": asdict(model.config), "model": model.state_dict(), "training": training}
    write_whole(path, lambda file: torch.save(content, file))


def load(path, device="cpu", want=None):
    """The model in a checkpoint, ready to `detect`; with `want` it must be of that kind. Raises InputError."""
    return restore(read(path, want), path).to(device)


def read(path, want=None):
    """A checkpoint's content, with "config" as a ModelConfig. Raises InputError, also for a model of another kind than
    `want`, if that is given."""
    content = read_tensors(path)
    if not is_checkpoint(content):
        raise InputError(f"{path}: not a checkpoint of this program; {CONVERT}")
    with checkpoint_errors(path):
        content = {"training": None} | content | {"config": ModelConfig(**content["config"])}
    kind = content["config"].kind
    if want and kind != want:
        raise InputError(f"{path}: holds a model of kind {kind}, not a {want}")
    return content


def is_checkpoint(content):
    """Whether a file's content is a checkpoint in the format of this program."""
    return isinstance(content, dict) and content.get("msad") == FORMAT


def restore(content, path):
    """The model of a checkpoint's content, in eval mode. Raises InputError where the tensors do not fit it."""
    with checkpoint_errors(path, "its tensors do not fit its description"):
        model = build(content["config"])
        model.load_state_dict(content["model"])
    return model.eval()
