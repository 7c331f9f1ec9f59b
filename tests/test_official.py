"""Weights from elsewhere: made-up files against the networks they stand for, computed the plain way."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import tiny_model
from official_files import WIDTHS, Network, authors_input, empty_state, random_state

import distill
from msad import align, checkpoint, official
from msad.resnet import ResNet

SIZES = [(128, 150), (101, 192)]  # of two images in a batch of 128x192


@pytest.fixture(scope="module")
def images():
    """Uniform noise (2,3,128,192), padded to the right and below."""
    return torch.randint(0, 256, (2, 3, 128, 192), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def model_of(state, want=None):
    return checkpoint.restore(official.translate(state, "a.pth", want), "a.pth")


def assert_close(ours, theirs):
    """Agreement everywhere to 1e-4 of the largest value, which must be of a sensible order to mean anything."""
    assert ours.shape == theirs.shape
    assert 0.01 < theirs.abs().max() < 100
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def assert_branch_agrees(pyramid, outputs, maps, network):
    """Our five maps and predictions of a branch, against `maps` and what the authors' network predicts from them."""
    for ours, theirs in zip(pyramid, maps, strict=True):
        assert_close(ours, theirs)
    predictions = network.predict(maps)
    cells = [x.shape[-2] * x.shape[-1] for x in maps]
    for name, channels in (("logits", 80), ("boxes", 4), ("centerness", 1)):
        for ours, theirs in zip(outputs[name].split(cells, dim=1), predictions[name], strict=True):
            assert_close(ours.reshape(len(ours), -1, channels), theirs.flatten(2).transpose(1, 2))


@torch.inference_mode()
@pytest.mark.parametrize("width", [0.25, 0.5])
def test_a_teacher_computes_what_the_authors_slimmable_network_does(images, width):
    state = random_state("teacher", width)
    model, network = model_of({"model": state}), Network(state, "T", width)
    x = authors_input(images, SIZES)
    high, low = network.pyramid(x), network.pyramid(F.interpolate(x, scale_factor=0.5, mode="nearest"))
    maps = {"high": [high[level] for level in range(3, 8)], "low": [low[level] for level in range(2, 7)]}
    gates = [network.gate(h, l) for h, l in zip(maps["high"], maps["low"])]
    mixed = zip(gates, maps["high"], maps["low"])
    maps["fused"] = [w[:, 0].view(-1, 1, 1, 1) * h + w[:, 1].view(-1, 1, 1, 1) * l for w, h, l in mixed]

    pyramids, outputs = model(model.normalize(images, SIZES))
    for branch in ("high", "low", "fused"):
        assert_branch_agrees(pyramids[branch], outputs[branch], maps[branch], network)
    for weights, h, l in zip(gates, pyramids["high"], pyramids["low"]):
        assert_close(model.fusion.weights(h, l), weights)
    assert (torch.cat(gates) - 0.5).abs().max() > 0.1


@torch.inference_mode()
@pytest.mark.parametrize("width", [0.25, 0.5])
def test_a_student_computes_what_the_authors_slimmable_network_does(images, width):
    state = random_state("student", width, only="S_")
    model, network = model_of(state), Network(state, "S", width)
    found = network.pyramid(F.interpolate(authors_input(images, SIZES), scale_factor=0.5, mode="nearest"))
    low = align.downsample(model.normalize(images, SIZES), model.config.downsample)
    pyramids, outputs = model(low)
    assert_branch_agrees(pyramids["low"], outputs["low"], [found[level] for level in range(2, 7)], network)


@torch.inference_mode()
@pytest.mark.parametrize("width", [0.25, 0.75])
def test_a_slimmable_imagenet_backbone_computes_what_it_does_in_the_authors_detectors(images, width, tmp_path, capsys):
    state = random_state("imagenet", width)
    torch.save({"model": state}, tmp_path / "a.pt")
    backbone = ResNet("resnet50", width).eval()
    line = official.load_backbone(backbone, settings(tmp_path / "a.pt", "resnet50", width))
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    ours = backbone(tiny_model("high").normalize(images, SIZES))
    theirs = Network(plain, "", width).features(authors_input(images, SIZES), "features")
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our, their)
    assert "318 tensors used; dropped: 795 (other widths' BatchNorm), 2 (the classifier)" in line
    assert capsys.readouterr().out == f"weights   {line}\n"


def settings(weights, backbone="resnet18", width=1.0):
    return SimpleNamespace(weights=str(weights), backbone=backbone, width=width)


@torch.inference_mode()
@pytest.mark.parametrize("source", ["a file", "an old file", "a download"])
def test_torchvision_weights_compute_what_torchvision_does(source, images, tmp_path, monkeypatch):
    theirs = torchvision.models.resnet18().eval()
    state = theirs.state_dict()
    if source == "an old file":  # those of the first releases of torchvision are without counters
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pth")
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: {"resnet18": theirs}[name])
    ours = ResNet("resnet18").eval()
    line = official.load_backbone(ours, settings("imagenet" if source == "a download" else tmp_path / "a.pth"))
    assert f"{len(state) - 2} tensors used; dropped: 2 (the classifier)" in line

    x = images / 255
    maps = ours(x)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for layer, found in zip((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), maps, strict=True):
        y = layer(y)
        assert torch.equal(found, y)


def test_no_weights_leave_the_backbone_as_it_is():
    backbone = ResNet("resnet18", 0.25)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    assert official.load_backbone(backbone, settings("none")) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_the_teacher_of_a_students_file_is_the_one_of_a_teachers_file():
    student = random_state("student", 0.25, only="T_")
    teacher = {name: tensor for name, tensor in student.items() if not name.startswith("S_")}
    found = official.translate(student, "a.pth", want="teacher")
    alone = official.translate(teacher, "a.pth")
    assert found["config"] == alone["config"] and found["config"].kind == "teacher"
    assert found["model"].keys() == alone["model"].keys()
    assert all(torch.equal(tensor, alone["model"][name]) for name, tensor in found["model"].items())


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("layout", ["wrapped", "bare", "old"])
def test_files_are_recognised_by_what_is_in_them(kind, layout, tmp_path, capsys):
    path = tmp_path / {"teacher": "student.pth", "student": "teacher.pt"}[kind]
    state = empty_state(kind, 0.5)
    content = {"model": state, "iteration": 89999, "optimizer": {"state": {}, "param_groups": [{"lr": 0.01}]}}
    torch.save(state if layout == "bare" else content, path, _use_new_zipfile_serialization=layout != "old")
    model = checkpoint.load(path)
    config = model.config
    assert config.kind == {"teacher": "teacher", "student": "low"}[kind]
    assert (config.backbone, config.width, config.head, config.fpn_channels) == ("resnet50", 0.5, "fcos", 256)
    assert (config.head_convs, config.head_channels, config.object_scale) == (4, 256, 1.0)
    assert (config.pad, config.downsample, config.short_side, config.long_side) == (256, "nearest", 800, 1333)
    assert not model.training
    assert capsys.readouterr().out.startswith(f"weights   {path}: the authors' {kind}, width 0.5: ")


def test_the_classes_are_those_of_coco():
    ids = {c["id"]: c["name"] for c in official.COCO}
    assert list(ids) == sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
    assert [ids[i] for i in (1, 3, 13, 44, 90)] == ["person", "car", "stop sign", "bottle", "toothbrush"]
    assert len(set(ids.values())) == 80


def test_the_width_is_told_by_the_shapes():
    for width in WIDTHS:
        assert official.translate(empty_state("teacher", width), "a.pth")["config"].width == width


@pytest.mark.parametrize(
    "kind, want, parts",
    [  # 53 convolutions, 53 BatchNorms of 5 tensors for each width, 20 (18 without P7), 41 of the head, 2 of the gate
        ("teacher", None, [381, 795]),
        ("student", None, [377, 1176, 795, 2]),
        ("student", "teacher", [381, 795, 1174]),
    ],
)
def test_the_summary_accounts_for_every_tensor(kind, want, parts):
    state = empty_state(kind)
    summary = official.translate(state, "a.pth", want)["summary"]
    assert "\n" not in summary
    assert [int(n) for n in re.findall(r"(\d+) (?:tensors|\()", summary)] == parts
    assert sum(parts) == len(state)


def test_distillation_can_start_from_the_teacher_in_a_students_file(tmp_path):
    torch.save(empty_state("student", 0.5), tmp_path / "a.pth")
    found, teacher = distill.student_settings({"teacher": str(tmp_path / "a.pth")})
    assert teacher.config.kind == "teacher"
    assert (found.backbone, found.width, found.pad, found.downsample) == ("resnet50", 0.5, 256, "nearest")


def test_the_converter_writes_a_checkpoint_that_loads_as_the_same_model(tmp_path):
    source, target = tmp_path / "a.pth", tmp_path / "b.pt"
    torch.save({"model": random_state("teacher", 0.25)}, source)
    command = [sys.executable, "-m", "msad.official", str(source), str(target)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{source}: the authors' teacher, width 0.25: 381 tensors used; dropped: ")
    before, after = checkpoint.load(source), checkpoint.load(target)
    assert after.config == before.config
    assert after.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in after.state_dict().items())
