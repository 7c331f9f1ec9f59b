"""The four kinds of detector, by name."""

import torch

from .detector import Detector
from .teacher import MultiScale, Teacher

KINDS = {"teacher": Teacher, "conventional": MultiScale, "high": Detector, "low": Detector}


def build(config):
    """A new model of a ModelConfig's kind, in channels_last layout."""
    return KINDS[config.kind](config).to(memory_format=torch.channels_last)
