"""The optimizer of both training scripts, its learning rate, and its state from a checkpoint."""

import math

import torch
from torch import nn


def build_optimizer(model, settings):
    """SGD or AdamW over all parameters; normalisation layers have no weight decay."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    plain = [p for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)]
    decayed = [p for p in model.parameters() if all(p is not other for other in plain)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)


def set_learning_rate(optimizer, settings, iteration):
    """Linear warm-up, then steps at 2/3 and 8/9 of the run, or a cosine to 0."""
    warm = min(1.0, 0.001 + 0.999 * iteration / settings.warmup) if settings.warmup else 1.0
    done = iteration / settings.iters
    if settings.schedule == "cosine":
        decay = (1 + math.cos(math.pi * done)) / 2
    else:
        decay = 0.1 ** ((done >= 2 / 3) + (done >= 8 / 9))
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * warm * decay


def restore_state(optimizer, state):
    """Bring a new optimizer to the state that another's `state_dict` had; the new one keeps its settings."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.dim():  # in the parameter's memory layout, which fused steps take for granted
                values[name] = torch.empty_like(parameter).copy_(value)
