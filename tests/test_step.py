"""The step as it stands in both training scripts: a loss or gradient that is not finite stops the run and leaves the
weights as they were; the gradient is clipped; the learning rate is the iteration's."""

import json
import re

import pytest
import torch
from scripts import assert_same_run, complaint, runs, succeed
from torch.optim.optimizer import register_optimizer_step_pre_hook

from msad import distillation, models
from msad.engine import checkpoint

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def steps():
    """[(the groups' learning rates, {parameter: gradient})] of every step that an optimizer makes."""
    made = []

    def note(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        rates = {group["lr"] for group in optimizer.param_groups}
        made.append((rates, {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters}))

    handle = register_optimizer_step_pre_hook(note)
    yield made
    handle.remove()


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def logged(out):
    """The log's entries of iterations."""
    entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [entry for entry in entries if "iteration" in entry]


def steep(value):
    """The same number, with a gradient that is not finite."""
    return value + (value - value.detach()).sqrt()


@pytest.fixture
def run(uninterrupted, tmp_path):
    """A function that runs the script of a run again, with more flags, into `out` -> what `how` gives of it."""
    return lambda name, *flags, how=succeed: how(
        runs(uninterrupted)[name][0], *runs(uninterrupted)[name][1], *flags, "--out", tmp_path / "out"
    )


# The part of the loss that the tenth batch spoils, how, and what is said.
@pytest.mark.parametrize("name, flags, part, spoil, text", [
    ("trained", [], "box", lambda value: value * NAN, "/box nan"),
    ("trained", [], "cls", lambda value: value + INF, "/cls inf"),
    ("trained", [], "box", steep, "gradient nan"),
    ("distilled", [], "box", steep, "gradient nan"),
    ("trained", ["--res", "multi"], "box", lambda value: value * NAN, "/box nan"),
])  # fmt: skip
def test_a_step_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(
    uninterrupted, tmp_path, monkeypatch, steps, run, name, flags, part, spoil, text
):
    losses, before, out = models.Detector.losses, [], tmp_path / "out"

    def spoilt(model, *arguments):
        before.append((model, [p.detach().clone() for p in model.parameters()]))
        found = losses(model, *arguments)
        if len(before) == 10:
            branch = list(found)[-1]
            found[branch][part] = spoil(found[branch][part])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(models.Detector, "losses", spoilt)
        line = run(name, *flags, how=complaint)
    assert "iteration 9: the loss or its gradient is not finite" in line and text in line
    named = dict(pair.rsplit(" ", 1) for pair in re.search(r"\((.*)\)", line)[1].split(", "))
    entries = logged(out)
    assert list(named) == [key for key in entries[0] if key not in ("iteration", "lr")] + ["gradient"]
    assert [e["iteration"] for e in entries] == list(range(9)) and len(before) == 10 and len(steps) == 9
    model, weights = before[-1]
    assert all(p.equal(kept) for p, kept in zip(model.parameters(), weights))
    assert not any(p.equal(older) for p, older in zip(weights, before[-2][1]) if p.dim() > 1), "the step before"
    assert checkpoint.read(out / "last.pt")["training"]["done"] == 8
    if spoil is steep:
        succeed(runs(uninterrupted)[name][0], "--resume", "--out", out)
        assert_same_run(out, uninterrupted / name)


def test_a_distance_that_is_not_finite_stops_too(monkeypatch, steps, run):
    monkeypatch.setitem(distillation.DISTANCES, "l1", lambda student, fused: student[0].mean() * INF)
    line = run("distilled", how=complaint)
    assert "iteration 0:" in line and "kd nan" in line, "0, the weight of the distance there, times infinity"
    assert not steps


BOTH = pytest.mark.parametrize("name", ["trained", "distilled"])


@BOTH
def test_the_gradient_is_clipped_to_its_norm_and_not_beyond(steps, run, name):
    run(name, "--iters", 1, "--clip", 0)  # no limit
    whole = flat(steps[0][1].values()).double()  # fp32 loses 1e-4 of a sum over a million squares
    norm = whole.norm().item()
    for share, kept in ((1 / 3, 1 / 3), (3, 1)):
        run(name, "--iters", 1, "--clip", share * norm)
        clipped = flat(steps[-1][1].values()).double()
        assert clipped.norm().item() == pytest.approx(kept * norm, rel=1e-4)
        torch.testing.assert_close(clipped, kept * whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name, warmup, first", [("trained", 2, (0.001, 0.5005)), ("distilled", 0, (1, 1))])
def test_every_step_has_its_iteration_s_learning_rate(tmp_path, steps, run, name, warmup, first):
    run(name, "--iters", 9, "--warmup", warmup, "--optimizer", "sgd", "--schedule", "step", "--lr", 0.01)
    expected = [0.01 * share for share in (*first, 1, 1, 1, 1, 0.1, 0.1, 0.01)]
    assert [rate for rates, _ in steps for rate in rates] == pytest.approx(expected)
    assert [entry["lr"] for entry in logged(tmp_path / "out")] == pytest.approx(expected)


@BOTH
def test_a_batch_in_parts_has_the_mean_of_their_losses_and_gradients(tmp_path, monkeypatch, steps, run, name):
    losses, parts = models.Detector.losses, []

    def noted(model, *arguments):
        found = losses(model, *arguments)
        loss, parameters = sum(found["low"].values()), list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        parts.append((len(arguments[2]), loss.item(), dict(zip(parameters, gradients))))
        return found

    monkeypatch.setattr(models.Detector, "losses", noted)
    # No distance yet in the first iteration.
    run(name, "--batch", 6, "--accumulate", 3, "--clip", 0, "--iters", 1)
    assert [count for count, _, _ in parts] == [2, 2, 2]
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(sum(loss for _, loss, _ in parts) / 3, rel=1e-5)
    ((_, made),) = steps
    for parameter, gradient in made.items():
        mean = sum(gradients[parameter] for _, _, gradients in parts) / 3
        assert (gradient - mean).abs().max() <= 1e-5 * flat(made.values()).abs().max()


@BOTH
def test_frozen_norms_keep_the_statistics_that_they_start_with(uninterrupted, tmp_path, run, name):
    def statistics(folder):
        tensors = torch.load(folder / "last.pt", weights_only=True)["model"]
        return flat(tensor for key, tensor in tensors.items() if "running" in key)

    run(name, "--norm", "frozen", "--iters", 1)
    start = statistics(tmp_path / "out")
    run(name, "--norm", "frozen", "--iters", 2)
    assert start.equal(statistics(tmp_path / "out")) and not start.equal(statistics(uninterrupted / name))


@BOTH
def test_fp32_without_avx512_trains_in_nchw(monkeypatch, steps, run, name):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    run(name, "--iters", 1)
    maps = [g for _, gradients in steps for g in gradients.values() if g.dim() == 4 and min(g.shape[1:]) > 1]
    assert maps and all(g.is_contiguous() for g in maps)
