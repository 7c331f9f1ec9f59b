"""Checkpoints: whole or not at all, back to the bit, and one clear line for every file that is no checkpoint."""

import os
import random
import resource
from pathlib import Path

import pytest
import torch
from helpers import tiny_config, tiny_model

from msad import InputError, models
from msad.engine import checkpoint, files


def assert_refused(path, *expected, **how):
    with pytest.raises(InputError) as caught:
        checkpoint.load(path, **how)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and all(part in message for part in expected)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, tiny_model("low"), {"done": 1})
    return path


@pytest.mark.parametrize("head", models.HEADS)
@pytest.mark.parametrize("kind", models.KINDS)
def test_a_model_comes_back_to_the_bit_and_rebuilds_itself(tmp_path, kind, head):
    model = tiny_model(kind, seed=3, head=head, downsample="nearest", width=0.5, head_convs=2)
    training = {"done": 7, "settings": {"sides": (1, 2)}}
    checkpoint.save(tmp_path / "a.pt", model.train(), training)
    again = checkpoint.load(tmp_path / "a.pt")
    assert type(again) is type(model) and again.config == model.config and again.branches == model.branches
    assert not any(module.training for module in again.modules())
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(state[key].equal(value) for key, value in model.state_dict().items())
    assert checkpoint.read(tmp_path / "a.pt")["training"] == training
    pictures = [torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 128, 192)]
    for branch in model.branches:
        for found, expected in zip(again.detect(pictures, branch), model.eval().detect(pictures, branch), strict=True):
            assert len(expected["boxes"]) > 0 and all(found[key].equal(expected[key]) for key in expected)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_full_disk_leaves_the_previous_checkpoint(saved):
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(InputError, match=f"{saved}: cannot be written"):
            checkpoint.save(saved, tiny_model("low", seed=1), {"done": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["last.pt"]
    checkpoint.save(saved, tiny_model("low", seed=1), {"done": 2})
    assert saved.read_bytes() != before and checkpoint.read(saved)["training"] == {"done": 2}


def test_until_the_file_is_whole_it_has_another_name(saved, monkeypatch):
    before, written = saved.read_bytes(), []

    def replace(source, target):
        assert Path(target) == saved and saved.read_bytes() == before
        written.append(checkpoint.read(source)["training"]["done"])

    monkeypatch.setattr(files.os, "replace", replace)
    checkpoint.save(saved, tiny_model("low"), {"done": 2})
    assert written == [2] and saved.read_bytes() == before


class Touch:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_carries_code_is_refused_and_the_code_not_run(saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    torch.save(content | {"training": Touch(tmp_path / "ran")}, saved)
    assert_refused(saved, "carries code")
    assert not (tmp_path / "ran").exists()
    torch.load(saved, weights_only=False)
    assert (tmp_path / "ran").exists(), "the trap works"


def test_files_that_are_no_checkpoints_are_refused(saved, tmp_path):
    assert_refused(tmp_path / "absent.pt", "no such file")
    assert_refused(tmp_path)
    whole = saved.read_bytes()
    for content in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:-1], whole[1000:], bytes(5000)):
        saved.write_bytes(content)
        assert_refused(saved)
    hollow = {"msad": 1, "config": {}, "model": {}}
    for content in ({}, [1, 2], torch.zeros(3), {"model": {}}, {"msad": 2}, {"msad": 1}, hollow):
        torch.save(content, saved)
        assert_refused(saved)


def test_a_model_of_another_kind_than_wanted_is_refused(saved):
    assert_refused(saved, "kind low", "not a teacher", want="teacher")
    assert checkpoint.load(saved, want="low").config.kind == "low"


def test_what_only_a_run_needs_may_be_missing(saved):
    content = torch.load(saved, weights_only=True)
    del content["training"]
    torch.save(content, saved)
    assert checkpoint.read(saved)["training"] is None and checkpoint.load(saved).config.kind == "low"


def edit_tensor(**changes):
    return lambda content: content["model"].update({k.replace("__", "."): v for k, v in changes.items()})


MISFITS = {  # what is done to a checkpoint's content, and what the message names
    "shape": (edit_tensor(backbone__conv1__weight=torch.zeros(16, 3, 5, 5)), "backbone.conv1.weight"),
    "unknown tensor": (edit_tensor(foreign__tensor=torch.zeros(3)), "foreign.tensor"),
    "missing tensor": (lambda content: content["model"].pop("head.cls_logits.bias"), "head.cls_logits.bias"),
    "other width": (lambda content: content["config"].update(width=0.5), "conv1"),
    "endless width": (lambda content: content["config"].update(width=float("inf")), ""),
    "other kind": (lambda content: content["config"].update(kind="teacher"), "fusion"),
    "unknown kind": (lambda content: content["config"].update(kind="unheard of"), "unheard of"),
    "unknown field": (lambda content: content["config"].update(novelty=1), "novelty"),
    "missing field": (lambda content: content["config"].pop("classes"), "classes"),
    "another format": (lambda content: content.update(msad=2), "not a checkpoint of this program"),
    "no model": (lambda content: content.pop("model"), "model"),
    "no description": (lambda content: content.update(config=None), ""),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_and_description_must_fit(saved, case):
    edit, expected = MISFITS[case]
    content = torch.load(saved, weights_only=True)
    edit(content)
    torch.save(content, saved)
    assert_refused(saved, expected)


STRANGE = (None, "x", -1, 0, 0.5, float("nan"), 1e300, [], {}, (1,), torch.zeros(2), "teacher", "resnet50", {"id": 1})


def test_random_damage_gives_a_model_or_one_clear_line(saved):
    rng, whole, content = random.Random(0), saved.read_bytes(), torch.load(saved, weights_only=True)
    outcomes = {True: 0, False: 0}
    for trial in range(80):
        if trial % 2:  # bytes, most of them where the description is
            damaged = bytearray(whole)
            for _ in range(rng.choice((1, 3))):
                place = rng.randrange(rng.choice((3000, 40_000, len(whole))))
                damaged[place * rng.choice((1, -1))] = rng.randrange(256)
            saved.write_bytes(damaged)
        else:
            part = rng.choice(("config", "config", "model"))
            changed = content | {part: dict(content[part])}
            changed[part][rng.choice(list(changed[part]))] = rng.choice(STRANGE)
            torch.save(changed, saved)
        try:
            outcomes[checkpoint.load(saved).config.kind in models.KINDS] += 1
        except InputError as error:
            assert str(saved) in str(error) and "\n" not in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 5, outcomes


def test_what_an_optimizer_needs_survives(tmp_path):
    model = models.build(tiny_config("high"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    checkpoint.save(tmp_path / "a.pt", model, {"optimizer": optimizer.state_dict()})
    stored = checkpoint.read(tmp_path / "a.pt")["training"]["optimizer"]
    for one, other in zip(optimizer.state_dict()["state"].values(), stored["state"].values(), strict=True):
        assert all(one[key].equal(other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
