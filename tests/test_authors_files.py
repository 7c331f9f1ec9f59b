"""Weights from elsewhere: made-up files against the networks they stand for, computed the plain way; and one line for
files that cannot be used."""

import re
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from authors_files import Network, authors_input, empty_state, random_state
from helpers import tiny_model
from scripts import complaint, succeed

from msad import InputError, ModelConfig, align
from msad.engine import authors, checkpoint, settings
from msad.engine.weights import load_weights

SIZES = [(128, 150), (101, 192)]  # of two images in a batch of 128x192


@pytest.fixture(scope="module")
def images():
    """Uniform noise (2,3,128,192), padded to the right and below."""
    return torch.randint(0, 256, (2, 3, 128, 192), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def torchvision_input(images, sizes):
    """Padded RGB images (N,3,H,W) uint8 of sizes [(h,w)] as torchvision's trainers normalise them, padded with 0."""
    x = torch.zeros(images.shape)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for row, image, (height, width) in zip(x, images, sizes):
        row[:, :height, :width] = (image[:, :height, :width] / 255 - mean) / std
    return x


def assert_close(ours, theirs):
    """Agreement everywhere to 1e-4 of the largest value, which must be of a sensible order to mean anything."""
    assert ours.shape == theirs.shape
    assert 0.01 < theirs.abs().max() < 100
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def assert_branch_agrees(pyramid, outputs, maps, network):
    """Our five maps and predictions of a branch, against `maps` and what the authors' network predicts from them."""
    predictions = network.predict(maps)
    cells = [x.shape[-2] * x.shape[-1] for x in maps]
    pairs = list(zip(pyramid, maps, strict=True))
    for name in ("logits", "distances", "centerness"):
        flat = [theirs.flatten(2).transpose(1, 2) for theirs in predictions[name]]
        parts = outputs[name].split(cells, dim=1)
        pairs += [(ours.reshape(theirs.shape), theirs) for ours, theirs in zip(parts, flat, strict=True)]
    for ours, theirs in pairs:
        assert_close(ours, theirs)


@torch.inference_mode()
@pytest.mark.parametrize("width", [0.25, 0.5])
def test_a_teacher_computes_what_the_authors_slimmable_network_does(images, width):
    state = random_state("teacher", width)
    model, network = authors.convert(state), Network(state, "T", width)
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
def test_a_student_computes_what_the_authors_slimmable_network_does(images):
    state = random_state("student", 0.5, only="S_")
    model, network = authors.convert(state), Network(state, "S", 0.5)
    found = network.pyramid(F.interpolate(authors_input(images, SIZES), scale_factor=0.5, mode="nearest"))
    pyramids, outputs = model(align.downsample(model.normalize(images, SIZES), model.config.downsample))
    assert_branch_agrees(pyramids["low"], outputs["low"], [found[level] for level in range(2, 7)], network)


@torch.inference_mode()
@pytest.mark.parametrize("width", [0.25, 0.75])
def test_a_slimmable_imagenet_backbone_sees_what_it_was_trained_on(images, width, tmp_path, capsys):
    state = random_state("imagenet", width)
    state["module.features.0.0.weight"] *= 60  # for an input of order one
    torch.save({"model": state}, tmp_path / "a.pt")
    model = tiny_model("high", backbone="resnet50", width=width)
    load_weights(model, str(tmp_path / "a.pt"))
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    ours = model.backbone(model.normalize(images, SIZES))
    theirs = Network(plain, "", width).features(torchvision_input(images, SIZES), "features")
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our, their)
    # 53 convolutions, 53 BatchNorms of 5 tensors; three widths' BatchNorms and a classifier.
    printed = capsys.readouterr().out
    assert printed == f"weights   --weights {tmp_path}/a.pt: taken 318 tensors of the backbone; left behind 797\n"


@torch.inference_mode()
@pytest.mark.parametrize("source", ["a file", "an old file", "a download"])
def test_torchvision_weights_compute_what_torchvision_does(source, images, tmp_path, monkeypatch, capsys):
    theirs = torchvision.models.resnet18().eval()
    state = theirs.state_dict()
    if source == "an old file":  # those of the first releases of torchvision are without counters
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pth")
    downloads = {("resnet18", "IMAGENET1K_V1"): theirs}
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: downloads[name, weights])
    model = tiny_model("high", width=1.0)
    load_weights(model, "imagenet" if source == "a download" else str(tmp_path / "a.pth"))
    assert f" taken {len(state) - 2} tensors of the backbone; left behind 2\n" in capsys.readouterr().out  # classifier

    x, theirs = images.double() / 255, theirs.double()  # in fp32 memory layouts differ by 2e-5 on some processors
    maps = model.double().backbone(x)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for layer, found in zip((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), maps, strict=True):
        y = layer(y)
        torch.testing.assert_close(found, y, rtol=1e-9, atol=1e-9)


@pytest.fixture
def convert(tmp_path):
    """Write a content as a file of theirs, convert it by the command -> the model."""

    def run(content, *flags, **details):
        (tmp_path / "ours.pt").unlink(missing_ok=True)
        torch.save(content, tmp_path / "theirs.pth", **details)
        line = succeed(authors, tmp_path / "theirs.pth", tmp_path / "ours.pt", *flags)
        model = checkpoint.load(tmp_path / "ours.pt")
        role = {"low": "student", "teacher": "teacher"}[model.config.kind]
        assert line == f"written to {tmp_path}/ours.pt: the authors' {role}, width {model.config.width:g}\n"
        return model

    return run


@pytest.mark.parametrize("kind, layout, width", [
    ("teacher", "wrapped", 0.5), ("student", "wrapped", 0.75), ("student", "bare", 0.25), ("student", "old", 1.0),
])  # fmt: skip
def test_files_are_converted_whatever_is_around_them(kind, layout, width, convert):
    """The width is told by the shapes; an old file, in PyTorch's old format, is without counters."""
    state = empty_state(kind, width)
    if layout == "old":
        state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    content = {"model": state, "iteration": 89999, "optimizer": {"state": {}, "param_groups": [{"lr": 0.01}]}}
    content = state if layout == "bare" else content
    config = convert(content, _use_new_zipfile_serialization=layout != "old").config
    kind = {"teacher": "teacher", "student": "low"}[kind]
    assert config == ModelConfig(kind, config.classes, width=width, pad=256, downsample="nearest")
    assert (config.backbone, config.head, config.short_side, config.long_side) == ("resnet50", "fcos", 800, 1333)
    ids = {c["id"]: c["name"] for c in config.classes}
    assert list(ids) == sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
    assert [ids[i] for i in (1, 3, 13, 44, 90)] == ["person", "car", "stop sign", "bottle", "toothbrush"]
    assert len(set(ids.values())) == len(config.classes) == 80


def test_the_teacher_of_a_students_file_is_the_one_of_a_teachers_file(convert, tmp_path):
    student = random_state("student", 0.25, only="T_")
    found = convert(student, "--teacher")
    alone = convert({name: tensor for name, tensor in student.items() if not name.startswith("S_")})
    assert found.config == alone.config and found.config.kind == "teacher"
    assert all(tensor.equal(alone.state_dict()[name]) for name, tensor in found.state_dict().items())
    inherited = settings.inherit(checkpoint.read(tmp_path / "ours.pt", want="teacher"), "ours.pt")
    expected = {"backbone": "resnet50", "width": 0.25, "pad": 256, "downsample": "nearest", "test_side": 800}
    assert inherited.items() >= expected.items() and "data" not in inherited


# Files that cannot be used.


def spoilt(name, value):
    """A student's state dict with one tensor replaced, or left out."""
    state = empty_state("student") | {name: value}
    return {n: tensor for n, tensor in state.items() if tensor is not None}


MEAN = "S_backbone.bottom_up.features.7.body.4.bn.0.running_mean"
LATERAL = "S_backbone.fpn_lateral2.weight"
NO_DETECTOR = "not a detector of the paper's authors, or damaged"


@pytest.mark.parametrize("content, message", [
    (spoilt(MEAN, None), r"Missing key.*layer2.3.bn2.running_mean"),
    (spoilt("S_backbone.fpn_lateral6.weight", torch.zeros(1)), "Unexpected key.*fpn.lateral.6.weight"),
    (spoilt(MEAN, torch.zeros(97)), r"size mismatch for backbone.layer2.3.bn2.running_mean"),
    (spoilt(MEAN, [0.0] * 96), NO_DETECTOR),
    (spoilt(LATERAL, None), f"KeyError: '{LATERAL}'"),
    (spoilt(LATERAL, torch.zeros(256, 100, 1, 1)), NO_DETECTOR),
    ({"model": print}, "refused"),  # not a tensor but code
    ([1, 2], NO_DETECTOR),
])  # fmt: skip
def test_what_is_no_whole_detector_is_refused_in_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    line = complaint(authors, tmp_path / "a.pth", tmp_path / "b.pt")
    assert line.startswith(f"error: {tmp_path}/a.pth: ") and re.search(message, line)
    assert not (tmp_path / "b.pt").exists()


def test_a_file_that_is_not_converted_is_refused_with_the_command_that_converts_it(tmp_path):
    torch.save(empty_state("teacher"), tmp_path / "a.pth")
    with pytest.raises(InputError, match="a.pth: not a checkpoint of this program; .* python -m msad.engine.authors"):
        checkpoint.load(tmp_path / "a.pth")
    (tmp_path / "b.pt").write_bytes(b"work")
    assert "is there already" in complaint(authors, tmp_path / "a.pth", tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == b"work"


def assert_refused(message, weights, **changes):
    """In one line."""
    with pytest.raises(InputError, match=message) as error:
        load_weights(tiny_model("high", **changes), str(weights))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, backbone, message", [
    (empty_state("teacher", 0.5), "resnet50", "python -m msad.engine.authors"),
    (empty_state("imagenet"), "resnet18", "not ImageNet weights for --backbone resnet18 --width 0.25"),
    ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "resnet18", "Missing key"),
    (torchvision.models.resnet18().state_dict(), "resnet18", "size mismatch for conv1.weight"),
    (empty_state("imagenet") | {"module.neck": torch.zeros(1)}, "resnet50", "Unexpected key.* \"neck\""),
    ([1], "resnet50", "not ImageNet weights"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_in_one_line(content, backbone, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert_refused(f"a.pth: .*{message}", tmp_path / "a.pth", backbone=backbone)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>not found</html>", "another network", None])
def test_damaged_weights_in_the_cache_of_downloads_are_named_and_a_failed_download_too(content, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: (_ for _ in ()).throw(URLError("no route to host")))
    file = tmp_path / "checkpoints" / torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.split("/")[-1]
    file.parent.mkdir()
    if content == "another network":
        torch.save({"conv1.weight": torch.zeros(1)}, file)
    elif content is not None:
        file.write_bytes(content)
    mend = "no route to host.*--weights FILE" if content is None else f"; delete {file}"
    assert_refused(f"IMAGENET1K_V1 of resnet18: cannot be loaded .*{mend}", "imagenet", width=1.0)
