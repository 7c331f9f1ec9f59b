"""Models to files and back. A checkpoint is plain tensors, numbers and text, so it loads without running any code.

    {"msad": 1, "config": the ModelConfig's fields, "model": state dict, "training": what a run needs to go on}
"""

import os
import pickle
from dataclasses import asdict
from pathlib import Path

import torch

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
        raise InputError(f"{path}: refused: not a PyTorch file of plain tensors (damaged, or it carries code)") from None
    except Exception as error:  # the unpickler answers damaged bytes with almost any exception
        raise InputError(f"{path}: not a PyTorch file, or damaged ({type(error).__name__})") from None


def read(path):
    """A checkpoint's content, with "config" as a ModelConfig. Raises InputError."""
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("msad") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this program")
    try:
        return content | {"config": ModelConfig(**content["config"])}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: a damaged checkpoint ({error})") from None


def restore(content, path):
    """The model of a checkpoint's content, in eval mode. Raises InputError where the tensors do not fit it."""
    try:
        model = build(content["config"])
        model.load_state_dict(content["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its tensors do not fit its description: {reason[:300]}") from None
    return model.eval()


def load(path, device="cpu"):
    """The model in a checkpoint, ready to `detect`. Raises InputError."""
    return restore(read(path), path).to(device)
