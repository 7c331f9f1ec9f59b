"""What a run starts from besides a backbone: torchvision's detectors, and checkpoints of this program.

torchvision's own models stand in for their trained selves, every tensor of theirs random; nothing is downloaded.
"""

import pytest
import torch
import torchvision
from helpers import CLASSES, randomize, tiny_model

from msad import InputError, ModelConfig, align
from msad.engine import checkpoint
from msad.engine.weights import copy_detector, load_weights
from msad.models import build

SIZE = (128, 256)


@pytest.fixture(scope="module", params=["fcos", "retinanet"])
def theirs(request):
    """torchvision's detector as it would come from a download."""
    torch.manual_seed(0)
    make = torchvision.models.get_model_builder(f"{request.param}_resnet50_fpn")
    model = make(weights=None, weights_backbone=None, num_classes=91)
    randomize(model)
    for module in model.head.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.02)
    torch.nn.init.uniform_(model.head.regression_head.bbox_reg.bias, 2, 3)
    model.head_name = request.param
    return model.eval()


def start(theirs, kind, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: asked.append((name, weights)) or theirs)
    model = build(ModelConfig(kind, CLASSES, theirs.head_name)).eval()
    before = model.head.cls_logits.weight.clone()
    load_weights(model, "coco")
    assert asked == [(f"{theirs.head_name}_resnet50_fpn", "COCO_V1")]
    assert model.head.cls_logits.weight.equal(before), "the classes are others"
    return model


@torch.no_grad()
def test_torchvisions_detector_computes_the_same_here(theirs, monkeypatch, capsys, tmp_path):
    """A checkpoint and a student keep the biases that only torchvision has."""
    model = start(theirs, {"fcos": "teacher", "retinanet": "low"}[theirs.head_name], monkeypatch)
    line = capsys.readouterr().out
    assert line.startswith("weights   --weights coco: taken ") and "; P2, which" in line and line.count("\n") == 1
    left = 2 + 2 + 2 * (theirs.head_name == "retinanet")  # class outputs, P6, and P7, which a student lacks
    assert f"; left behind {left}; new " in line
    checkpoint.save(tmp_path / "a.pt", model)
    saved = checkpoint.load(tmp_path / "a.pt")
    model = build(ModelConfig("low", CLASSES, theirs.head_name)).eval()
    copy_detector(model, saved)

    images = torch.rand(2, 3, *SIZE)
    x = model.normalize(images, [])
    their_maps = list(theirs.backbone(x).values())
    maps = model.pyramid(x, range(2, 7))
    for found, expected in zip(maps[1:], their_maps[:3]):
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    outputs, expected = model.head(their_maps), theirs.head(their_maps)
    cls = model.head.cls_tower(their_maps[0])
    torch.testing.assert_close(cls, theirs.head.classification_head.conv(their_maps[0]), rtol=1e-4, atol=1e-5)
    if theirs.head_name == "retinanet":
        torch.testing.assert_close(outputs["deltas"], expected["bbox_regression"], rtol=1e-5, atol=1e-5)
        return
    torch.testing.assert_close(outputs["centerness"], expected["bbox_ctrness"].squeeze(-1), rtol=1e-5, atol=1e-5)
    # The same boxes, from points half a stride away.
    assert (expected["bbox_regression"] > 0.5).all()
    anchors = theirs.anchor_generator(torchvision.models.detection.image_list.ImageList(x, [SIZE] * 2), their_maps)[0]
    boxes = theirs.head.box_coder.decode(expected["bbox_regression"], anchors)
    found, _ = model.head.decode(outputs, align.map_sizes(their_maps), torch.arange(boxes.shape[1]))
    torch.testing.assert_close(found, boxes, rtol=1e-5, atol=1e-3)


@torch.no_grad()
def test_a_level_without_a_counterpart_starts_beside_it(theirs, monkeypatch):
    model = start(theirs, "teacher", monkeypatch)
    features = [torch.randn(1, c, 64 >> i, 64 >> i) for i, c in enumerate(model.backbone.channels)]
    p2, p3, *_ = model.fpn(features, align.LEVELS["low"])
    c3, c4, c5 = (model.fpn.lateral[str(level)](features[level - 2]) for level in (3, 4, 5))
    double = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    merged3 = c3 + double(c4 + double(c5))
    torch.testing.assert_close(p3, model.fpn.output["3"](merged3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(p2, model.fpn.output["3"](double(merged3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes, flags", [
    ({"width": 0.5}, "--width 1.0 (not 0.5)"),
    ({"backbone": "resnet101", "head_convs": 2}, "--backbone resnet50 (not resnet101), --head-convs 4 (not 2)"),
])  # fmt: skip
def test_torchvisions_detector_fits_one_network_only(changes, flags):
    with pytest.raises(InputError) as error:
        load_weights(build(ModelConfig("high", CLASSES, **changes)), "coco")
    assert str(error.value) == f"--weights coco: does not fit this network, only one of {flags}"


# Checkpoints of this program.


def start_tiny(model, source, path, capsys):
    """The line that is printed, and the names of tensors that are the source's; the others are as they were."""
    checkpoint.save(path, source)
    own = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    load_weights(model, str(path))
    state, there = model.state_dict(), source.state_dict()
    taken = {n for n, tensor in state.items() if n in there and tensor.equal(there[n])}
    assert all(state[n].equal(own[n]) for n in own.keys() - taken)
    return capsys.readouterr().out, taken


@pytest.mark.parametrize("kind, source", [("teacher", "low"), ("low", "teacher"), ("conventional", "high")])
@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_a_detector_of_other_classes_gives_all_but_its_class_outputs(kind, source, head, tmp_path, capsys):
    model, other = tiny_model(kind, head=head), tiny_model(source, seed=1, head=head)
    names = model.state_dict().keys()
    # Equal classes: everything that both have.
    _, taken = start_tiny(model, other, tmp_path / "a.pt", capsys)
    assert taken == names & other.state_dict().keys()
    # Other classes, as many or not: their outputs start afresh.
    for classes in (CLASSES[1:], [c | {"name": c["name"] + "s"} for c in CLASSES]):
        there = build(ModelConfig(**vars(other.config) | {"classes": tuple(classes)}))
        line, taken = start_tiny(tiny_model(kind, head=head, seed=2), there, tmp_path / "a.pt", capsys)
        assert {"head.cls_logits.weight", "head.cls_logits.bias"}.isdisjoint(taken)
        assert taken >= (names & there.state_dict().keys()) - {"head.cls_logits.weight", "head.cls_logits.bias"}
        left = there.state_dict().keys() - taken
        assert line.startswith(f"weights   --weights {tmp_path}/a.pt: taken ") and f" left behind {len(left)};" in line


def test_of_a_detector_with_another_head_the_backbone_and_pyramid_are_taken(tmp_path, capsys):
    model, other = tiny_model("low"), tiny_model("low", seed=1, head="retinanet")
    _, taken = start_tiny(model, other, tmp_path / "a.pt", capsys)
    assert taken == {name for name in model.state_dict() if not name.startswith("head.")}
    with pytest.raises(InputError, match=r"only one of --width 0.25 \(not 0.5\)"):
        load_weights(tiny_model("low", width=0.5), str(tmp_path / "a.pt"))
