"""Weights from elsewhere: made-up files against the networks they stand for, computed the plain way; and for files that
cannot be used a line that says which tensor does not fit, or what is wrong."""

import re
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from authors_files import WIDTHS, Network, authors_input, empty_state, random_state
from helpers import tiny_model

from msad import InputError, align
from msad.engine import checkpoint, settings

SIZES = [(128, 150), (101, 192)]  # of two images in a batch of 128x192


@pytest.fixture(scope="module")
def images():
    """Uniform noise (2,3,128,192), padded to the right and below."""
    return torch.randint(0, 256, (2, 3, 128, 192), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def torchvision_input(images, sizes):
    """Padded RGB images (N,3,H,W) uint8 of sizes [(h,w)] as torchvision's trainers normalise them, zeros for padding."""
    x = torch.zeros(images.shape)
    for row, image, (height, width) in zip(x, images, sizes):
        for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
            row[channel, :height, :width] = (image[channel, :height, :width] / 255 - mean) / std
    return x


def model_of(state, want=None):
    return checkpoint.restore(checkpoint.from_authors(state, "a.pth", want), "a.pth")


def counted(capsys):
    """The numbers of tensors in the only line that was printed: the used ones, and those dropped for each reason."""
    printed = capsys.readouterr().out
    assert printed.startswith("weights   ") and printed.count("\n") == 1
    return [int(n) for n in re.findall(r"(\d+) (?:tensors|\()", printed)]


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
    for name, channels in (("logits", 80), ("distances", 4), ("centerness", 1)):
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
def test_a_slimmable_imagenet_backbone_sees_what_it_was_trained_on(images, width, tmp_path, capsys):
    state = random_state("imagenet", width)
    state["module.features.0.0.weight"] *= 60  # for an input of order one
    torch.save({"model": state}, tmp_path / "a.pt")
    model = tiny_model("high", backbone="resnet50", width=width)
    checkpoint.load_weights(model, str(tmp_path / "a.pt"))
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    ours = model.backbone(model.normalize(images, SIZES))
    theirs = Network(plain, "", width).features(torchvision_input(images, SIZES), "features")
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our, their)
    assert counted(capsys) == [318, 795, 2]  # other widths' BatchNorm, and the classifier, are dropped


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
    checkpoint.load_weights(model, "imagenet" if source == "a download" else str(tmp_path / "a.pth"))
    assert counted(capsys) == [len(state) - 2, 2]  # the classifier is dropped

    x = images / 255
    maps = model.backbone(x)
    y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    for layer, found in zip((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), maps, strict=True):
        y = layer(y)
        torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)


def test_the_teacher_of_a_students_file_is_the_one_of_a_teachers_file():
    student = random_state("student", 0.25, only="T_")
    teacher = {name: tensor for name, tensor in student.items() if not name.startswith("S_")}
    found = checkpoint.from_authors(student, "a.pth", want="teacher")
    alone = checkpoint.from_authors(teacher, "a.pth")
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
    classes = checkpoint.from_authors(empty_state("teacher"), "a.pth")["config"].classes
    ids = {c["id"]: c["name"] for c in classes}
    assert list(ids) == sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
    assert [ids[i] for i in (1, 3, 13, 44, 90)] == ["person", "car", "stop sign", "bottle", "toothbrush"]
    assert len(set(ids.values())) == len(classes) == 80


def test_the_width_is_told_by_the_shapes():
    for width in WIDTHS:
        assert checkpoint.from_authors(empty_state("teacher", width), "a.pth")["config"].width == width


@pytest.mark.parametrize(
    "kind, want, parts",
    [  # 53 convolutions, 53 BatchNorms of 5 tensors for each width, 20 (18 without P7), 41 of the head, 2 of the gate
        ("teacher", None, [381, 795]),
        ("student", None, [377, 1176, 795, 2]),
        ("student", "teacher", [381, 795, 1174]),
    ],
)
def test_the_printed_line_accounts_for_every_tensor(kind, want, parts, capsys):
    state = empty_state(kind)
    checkpoint.from_authors(state, "a.pth", want)
    assert counted(capsys) == parts and sum(parts) == len(state)


def test_distillation_can_start_from_the_teacher_in_a_students_file(tmp_path):
    torch.save(empty_state("student", 0.5), tmp_path / "a.pth")
    content = checkpoint.read(tmp_path / "a.pth", want="teacher")
    assert content["config"].kind == "teacher"
    inherited = settings.inherit(content, tmp_path / "a.pth")
    expected = {"backbone": "resnet50", "width": 0.5, "pad": 256, "downsample": "nearest", "test_side": 800}
    assert inherited.items() >= expected.items() and "data" not in inherited


def test_a_file_of_theirs_can_be_saved_as_one_of_ours(tmp_path):
    source, target = tmp_path / "a.pth", tmp_path / "b.pt"
    torch.save({"model": random_state("teacher", 0.25)}, source)
    before = checkpoint.load(source)
    checkpoint.save(target, before)
    after = checkpoint.load(target)
    assert after.config == before.config
    assert after.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in after.state_dict().items())


# Files that cannot be used.


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
        checkpoint.from_authors(state, "a.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lateral", [None, torch.zeros(256, 100, 1, 1), torch.zeros(64), "text"])
def test_a_file_of_no_known_width_is_refused(lateral):
    name = "T_backbone.fpn_lateral2.weight"
    state = empty_state("teacher") | {name: lateral}
    with pytest.raises(InputError, match=name):
        checkpoint.from_authors({k: v for k, v in state.items() if v is not None}, "a.pth")


def test_only_the_counters_of_batchnorm_may_be_missing():
    state = {n: tensor for n, tensor in empty_state("student").items() if not n.endswith("num_batches_tracked")}
    assert model_of(state).config.kind == "low"


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
        (empty_state("teacher", 0.5), "resnet50", r"does not fit .* --width 0.5 \(not 0.25\)"),
        (empty_state("imagenet"), "resnet18", "holds a slimmable resnet50, not a resnet18"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "resnet18", "width 0.25: tensor bn1.weight is missing"),
        (torchvision.models.resnet18().state_dict(), "resnet18", r"conv1.weight is \(64, .* must be \(16, 3, 7, 7\)"),
        (empty_state("imagenet") | {"module.neck": torch.zeros(1)}, "resnet50", "slimmable .* neck is unknown"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line_and_change_nothing(content, backbone, message, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    model = tiny_model("high", backbone=backbone)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=f"a.pth: .*{message}") as error:
        checkpoint.load_weights(model, str(tmp_path / "a.pth"))
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failed_download_is_an_error_of_one_line(monkeypatch):
    def fail(name, weights):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(InputError, match="of resnet18 cannot be downloaded .*no route to host.*--weights FILE") as error:
        checkpoint.load_weights(tiny_model("high"), "imagenet")
    assert "\n" not in str(error.value)
