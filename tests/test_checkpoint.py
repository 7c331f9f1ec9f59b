"""Checkpoints: whole or not at all, back to the bit, and one clear line for every file that is no checkpoint."""

import os
from pathlib import Path

import pytest
import torch
from helpers import tiny_model

from msad import InputError, models
from msad.engine import checkpoint


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
    cut = whole[:100], whole[: len(whole) // 2], whole[:-1], whole[1000:]
    spoilt = bytes(9) + whole[9:], whole[:2000] + bytes(400) + whole[2400:]
    for content in (b"", b"hello", bytes(5000), *cut, *spoilt):
        saved.write_bytes(content)
        assert_refused(saved)
    for content in ({}, [1, 2], torch.zeros(3), {"model": {}}, {"msad": 2}, {"msad": 1}):
        torch.save(content, saved)
        assert_refused(saved)


def test_what_only_a_run_needs_may_be_missing_and_the_kind_must_be_the_wanted_one(saved):
    content = torch.load(saved, weights_only=True)
    del content["training"]
    torch.save(content, saved)
    assert checkpoint.read(saved)["training"] is None and checkpoint.load(saved, want="low").config.kind == "low"
    assert_refused(saved, "kind low", "not a teacher", want="teacher")


STRANGE = (None, "x", -1, 0.5, float("nan"), float("inf"), [], {}, (1,), torch.zeros(2), "teacher", {"id": 1})
MISFITS = {  # what is done to a checkpoint's content, and what the message names
    "shape": (lambda c: c["model"].update({"backbone.conv1.weight": torch.zeros(16, 3, 5, 5)}), "conv1.weight"),
    "unknown tensor": (lambda c: c["model"].update({"foreign.tensor": torch.zeros(3)}), "foreign.tensor"),
    "missing tensor": (lambda c: c["model"].pop("head.cls_logits.bias"), "head.cls_logits.bias"),
    "other width": (lambda c: c["config"].update(width=0.5), "conv1"),
    "other kind": (lambda c: c["config"].update(kind="teacher"), "fusion"),
    "unknown kind": (lambda c: c["config"].update(kind="unheard of"), "unheard of"),
    "unknown field": (lambda c: c["config"].update(novelty=1), "novelty"),
    "missing field": (lambda c: c["config"].pop("classes"), "classes"),
    "another format": (lambda c: c.update(msad=2), "not a checkpoint of this program"),
    "no model": (lambda c: c.pop("model"), "model"),
    "no description": (lambda c: c.update(config=None), ""),
    "no tensor": (lambda c: c["model"].update({"backbone.conv1.weight": "x"}), "backbone.conv1.weight"),
} | {f"width {value}": (lambda c, value=value: c["config"].update(width=value), "") for value in STRANGE}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_and_description_must_fit(saved, case):
    edit, expected = MISFITS[case]
    content = torch.load(saved, weights_only=True)
    edit(content)
    torch.save(content, saved)
    assert_refused(saved, expected)
