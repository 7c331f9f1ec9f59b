"""Weights that cannot be used: each is refused in a line that says which tensor does not fit, or what is wrong."""

import re
import sys
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from helpers import tiny_model
from official_files import empty_state

from msad import InputError, checkpoint, official
from msad.official.__main__ import convert
from msad.resnet import ResNet


def settings(weights, backbone, width=1.0):
    return SimpleNamespace(weights=str(weights), backbone=backbone, width=width)


@pytest.mark.parametrize("prefix", ["T_", "S_"])
@pytest.mark.parametrize("fault", ["missing", "unknown", "wrong shape", "no tensor"])
def test_a_tensor_that_does_not_fit_is_named(prefix, fault):
    state = empty_state("student")
    name = f"{prefix}backbone.bottom_up.features.7.body.4.bn.2.running_mean"
    if fault == "missing":
        del state[name]
    elif fault == "unknown":
        name = f"{prefix}backbone.fpn_lateral6.weight"
        state[name] = torch.zeros(1)
    else:
        state[name] = torch.zeros(97) if fault == "wrong shape" else [0.0] * 96
    message = re.escape(f"a.pth: the authors' student, width 0.25: tensor {name} is ")
    with pytest.raises(InputError, match=message) as error:
        official.translate(state, "a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lateral", [None, torch.zeros(256, 100, 1, 1), torch.zeros(64), "text"])
def test_a_file_of_no_known_width_is_refused(lateral):
    name = "T_backbone.fpn_lateral2.weight"
    state = empty_state("teacher") | {name: lateral}
    with pytest.raises(InputError, match=name):
        official.translate({k: v for k, v in state.items() if v is not None}, "a.pth")


def test_only_the_counters_of_batchnorm_may_be_missing():
    state = {n: tensor for n, tensor in empty_state("student").items() if not n.endswith("num_batches_tracked")}
    assert checkpoint.restore(official.translate(state, "a.pth"), "a.pth").config.kind == "low"


class Code:
    """Something that only code could restore."""


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": Code()}, "refused"),
        ([1, 2], "holds no weights"),
        ({1: torch.zeros(1)}, "holds no weights"),
        ({"model": {"conv1.weight": torch.zeros(1)}}, "neither a checkpoint of this program nor"),
        (empty_state("imagenet"), "neither a checkpoint of this program nor .* --weights FILE --width W"),
    ],
)
def test_what_is_no_detector_is_refused_in_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"a.pth: {message}") as error:
        checkpoint.load(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, backbone, message",
    [
        ({"model": Code()}, "resnet50", "refused"),
        (empty_state("teacher"), "resnet50", "holds a detector"),
        (empty_state("imagenet"), "resnet18", "holds a slimmable resnet50, not a resnet18"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "resnet18", "width 0.25: tensor bn1.weight is missing"),
        (torchvision.models.resnet18().state_dict(), "resnet18", r"conv1.weight is \(64, .* must be \(16, 3, 7, 7\)"),
        (empty_state("imagenet") | {"module.neck": torch.zeros(1)}, "resnet50", "slimmable .* neck is unknown"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(content, backbone, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"a.pth: .*{message}") as error:
        official.load_backbone(ResNet(backbone, 0.25), settings(tmp_path / "a.pth", backbone, 0.25))
    assert "\n" not in str(error.value)


def test_a_failed_download_is_an_error_of_one_line(monkeypatch):
    def fail(name, weights):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(InputError, match="resnet18 cannot be downloaded .*no route to host.*--weights FILE") as error:
        official.load_backbone(ResNet("resnet18"), settings("imagenet", "resnet18"))
    assert "\n" not in str(error.value)


def test_the_converter_refuses_what_needs_no_converting(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a.pt", tiny_model("low"))
    monkeypatch.setattr(sys, "argv", ["official", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")])
    with pytest.raises(InputError, match="a.pt: is a checkpoint of this program already"):
        convert()
    assert not (tmp_path / "b.pt").exists()
