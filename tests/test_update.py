"""The optimizer's step: a run that stops being finite keeps its last good weights, whenever somebody asks."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from msad.annotations import InputError
from msad.settings import SMALL
from msad.training import Update, lr_at, optimizer_for


def updates(optimizer, every):
    """A small model, its Update, and a function that makes the step of an iteration with a given factor on the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    settings = replace(SMALL, optimizer=optimizer, lr=0.1, clip=0.5)
    update = Update(model, optimizer_for(model, settings), settings, torch.device("cpu"))
    update.every = every

    def step(iteration, factor=1.0):
        losses = {"one": model(torch.ones(1, 3, 2, 2)).square().mean() * factor, "two": torch.tensor(2.5)}
        return update(iteration, sum(losses.values()), losses)

    return model, update, step


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_stay_from_the_first_step_that_is_not_finite_until_somebody_asks(optimizer):
    model, update, step = updates(optimizer, every=100)
    for iteration in (1, 2):
        before = weights(model)
        assert step(iteration) == lr_at(update.settings, iteration)
        assert not any(a.equal(b) for a, b in zip(before[:2], weights(model)))
    update.check()
    before = weights(model)
    step(3, float("nan"))
    step(4)
    assert all(a.equal(b) for a, b in zip(before, weights(model)))
    with pytest.raises(InputError, match=r"iteration 3: .*loss nan, one nan, two 2.5, gradient nan"):
        update.check()


@pytest.mark.parametrize("factor, text", [(float("nan"), "one nan"), (float("inf"), "one inf"), (1e38, "gradient inf")])
def test_where_asking_is_free_the_step_itself_stops(factor, text):
    model, _, step = updates("adamw", every=1)
    step(0)
    before = weights(model)
    with pytest.raises(InputError, match=f"iteration 1: .*{text}"):
        step(1, factor)
    assert all(a.equal(b) for a, b in zip(before, weights(model)))


def test_the_gradient_is_clipped_to_its_norm_and_not_beyond():
    model, update, step = updates("sgd", every=1)
    for factor, clipped in ((1e4, True), (1e-4, False)):
        step(0, factor)
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (abs(gradients.norm().item() - 0.5) < 1e-4) == clipped
