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


SPOILT = {  # the part of the loss that the tenth batch spoils, how, and what the message says
    "a part is nan": ("box", lambda value: value * NAN, "/box nan"),
    "a part is infinite": ("cls", lambda value: value + INF, "/cls inf"),
    "only the gradient": ("box", steep, "gradient nan"),
}


@pytest.mark.parametrize(
    "name, case", [*(("trained", case) for case in SPOILT), ("distilled", "only the gradient"), ("teacher", "a part is nan")]
)
def test_a_step_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(
    uninterrupted, tmp_path, monkeypatch, steps, name, case
):
    part, spoil, text = SPOILT[case]
    script, flags = runs(uninterrupted)["trained" if name == "teacher" else name]
    flags = [*flags, "--res", "multi"] if name == "teacher" else flags
    losses, before = models.Detector.losses, []

    def spoilt(model, *arguments):
        before.append((model, [p.detach().clone() for p in model.parameters()]))
        found = losses(model, *arguments)
        if len(before) == 10:
            branch = list(found)[-1]
            found[branch][part] = spoil(found[branch][part])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(models.Detector, "losses", spoilt)
        line = complaint(script, *flags, "--out", tmp_path / "out")
    assert "iteration 9: the loss or its gradient is not finite" in line and text in line
    named = dict(pair.rsplit(" ", 1) for pair in re.search(r"\((.*)\)", line)[1].split(", "))
    entries = logged(tmp_path / "out")
    assert list(named) == [key for key in entries[0] if key not in ("iteration", "lr")] + ["gradient"]
    assert [e["iteration"] for e in entries] == list(range(9)) and len(before) == 10 and len(steps) == 9
    model, weights = before[-1]
    assert all(p.equal(kept) for p, kept in zip(model.parameters(), weights))
    assert not any(p.equal(older) for p, older in zip(weights, before[-2][1]) if p.dim() > 1), "the step before"
    assert checkpoint.read(tmp_path / "out" / "last.pt")["training"]["done"] == 8
    if name != "teacher":
        succeed(script, "--resume", "--out", tmp_path / "out")
        assert_same_run(tmp_path / "out", uninterrupted / name)


def test_a_distance_that_is_not_finite_stops_too(uninterrupted, tmp_path, monkeypatch, steps):
    monkeypatch.setitem(distillation.DISTANCES, "l1", lambda student, fused: student[0].mean() * INF)
    script, flags = runs(uninterrupted)["distilled"]
    line = complaint(script, *flags, "--out", tmp_path / "out")
    assert "iteration 0:" in line and "kd nan" in line, "0, the weight of the distance there, times infinity"
    assert not steps


@pytest.mark.parametrize("name", ["trained", "distilled"])
def test_the_gradient_is_clipped_to_its_norm_and_not_beyond(uninterrupted, tmp_path, steps, name):
    script, flags = runs(uninterrupted)[name]
    flags = [*flags, "--iters", 1, "--out", tmp_path / "out", "--clip"]
    succeed(script, *flags, 0)  # no limit
    whole = flat(steps[0][1].values()).double()  # fp32 loses 1e-4 of a sum over a million squares
    norm = whole.norm().item()
    for share, kept in ((1 / 3, 1 / 3), (3, 1)):
        succeed(script, *flags, share * norm)
        clipped = flat(steps[-1][1].values()).double()
        assert clipped.norm().item() == pytest.approx(kept * norm, rel=1e-4)
        torch.testing.assert_close(clipped, kept * whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name, warmup, first", [("trained", 2, (0.001, 0.5005)), ("distilled", 0, (1, 1))])
def test_every_step_has_its_iteration_s_learning_rate(uninterrupted, tmp_path, steps, name, warmup, first):
    script, flags = runs(uninterrupted)[name]
    flags = [*flags, "--iters", 9, "--warmup", warmup, "--optimizer", "sgd", "--schedule", "step", "--lr", 0.01]
    succeed(script, *flags, "--out", tmp_path / "out")
    expected = [0.01 * share for share in (*first, 1, 1, 1, 1, 0.1, 0.1, 0.01)]
    assert [rate for rates, _ in steps for rate in rates] == pytest.approx(expected)
    assert [entry["lr"] for entry in logged(tmp_path / "out")] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["trained", "distilled"])
def test_a_batch_in_parts_has_the_mean_of_their_losses_and_gradients(uninterrupted, tmp_path, monkeypatch, steps, name):
    script, flags = runs(uninterrupted)[name]
    losses, parts = models.Detector.losses, []

    def noted(model, *arguments):
        found = losses(model, *arguments)
        loss, parameters = sum(found["low"].values()), list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        parts.append((len(arguments[2]), loss.item(), dict(zip(parameters, gradients))))
        return found

    monkeypatch.setattr(models.Detector, "losses", noted)
    parted = ["--batch", 6, "--accumulate", 3, "--clip", 0, "--iters", 1]  # no distance yet in the first iteration
    succeed(script, *flags, *parted, "--out", tmp_path / "out")
    assert [count for count, _, _ in parts] == [2, 2, 2]
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(sum(loss for _, loss, _ in parts) / 3, rel=1e-5)
    ((_, made),) = steps
    for parameter, gradient in made.items():
        mean = sum(gradients[parameter] for _, _, gradients in parts) / 3
        assert (gradient - mean).abs().max() <= 1e-5 * flat(made.values()).abs().max()


@pytest.mark.parametrize("name", ["trained", "distilled"])
def test_frozen_norms_keep_the_statistics_that_they_start_with(uninterrupted, tmp_path, name):
    script, flags = runs(uninterrupted)[name]
    statistics = {}
    for norm, iters in (("sync", 1), ("sync", 2), ("frozen", 1), ("frozen", 2)):
        succeed(script, *flags, "--norm", norm, "--iters", iters, "--out", tmp_path / "out")
        tensors = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"]
        statistics[norm, iters] = flat(tensor for key, tensor in tensors.items() if "running" in key)
    assert not statistics["sync", 1].equal(statistics["sync", 2])
    assert statistics["frozen", 1].equal(statistics["frozen", 2])


@pytest.mark.parametrize("name", ["trained", "distilled"])
def test_fp32_without_avx512_trains_in_nchw(uninterrupted, tmp_path, monkeypatch, steps, name):
    script, flags = runs(uninterrupted)[name]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    succeed(script, *flags, "--iters", 1, "--out", tmp_path / "out")
    maps = [g for _, gradients in steps for g in gradients.values() if g.dim() == 4 and min(g.shape[1:]) > 1]
    assert maps and all(g.is_contiguous() for g in maps)
