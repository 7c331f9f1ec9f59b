"""What a detector costs: multiply-accumulates against hand counts, the size they are counted at, and times."""

import json

import evaluate
import pytest
import torch
from folders import noise, write
from helpers import tiny_config, tiny_model
from PIL import Image
from scripts import succeed
from torch import nn

from msad import annotations, checkpoint, cost, models
from msad.data import CocoDataset

BRANCHES = [("high", "high"), ("low", "low"), ("teacher", "high"), ("teacher", "low"), ("conventional", "low")]


def by_hand(model, branch, images):
    """{part: multiply-accumulates / 1e9}, counted in hooks from each layer's definition while it runs."""
    counted = dict.fromkeys((*cost.PARTS, "fusion"), 0)

    def hook(part):
        def add(layer, inputs, output):
            each = layer.weight[0].numel()  # products for one number of the output
            counted[part] += output.numel() * each / 1e9

        return add

    for part in counted:
        for layer in getattr(model, part, nn.Identity()).modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(hook(part))
    with torch.no_grad():
        model.predict(model.pyramids(images, [branch]))
    return counted


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize("kind, branch", [*BRANCHES, ("teacher", "fused")])
def test_macs_are_those_of_every_convolution_that_runs(kind, branch, head):
    model = models.build(tiny_config(kind, head=head)).eval()
    found = cost.gmacs(model, branch, 120, 192)  # padded to 128 x 192
    expected = by_hand(model, branch, torch.zeros(1, 3, *((64, 96) if kind == "low" else (128, 192))))
    assert [found[part] for part in cost.PARTS] == pytest.approx([expected[part] for part in cost.PARTS], rel=1e-9)
    assert found["total"] == pytest.approx(sum(expected.values()), rel=1e-9)
    assert (expected["fusion"] > 0) == (branch == "fused")


def test_the_head_by_arithmetic():
    locations = 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1  # of a 128 x 128 input
    towers = 2 * 9 * 32 * 64  # two of one 3x3 convolution, from 32 channels of the pyramid to 64
    outputs = 9 * 64 * (3 + 4 + 1)  # 3x3 convolutions to classes, box and centerness
    for kind in ("high", "low"):
        assert cost.gmacs(tiny_model(kind), kind, 128, 128)["head"] == locations * (towers + outputs) / 1e9


def test_low_resolution_saves_three_quarters_of_all_but_the_head():
    high, low = (cost.gmacs(tiny_model("teacher"), branch, 256, 256) for branch in ("high", "low"))
    assert low["backbone"] == high["backbone"] / 4 and low["head"] == high["head"]


def test_counting_leaves_the_model_alone():
    model = models.build(tiny_config("teacher")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost.gmacs(model, "fused", 64, 64)
    assert model.training and all(t.equal(before[n]) for n, t in model.state_dict().items())


@pytest.fixture
def data(tmp_path):
    """Seven pictures, four of which are padded to 128 x 192 (height, width) by a model that tests at 128."""
    sizes = [(64, 64), (128, 140), (128, 180), (100, 140), (192, 128), (128, 192), (30, 30)]
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes, 1)]
    for entry in images:
        (tmp_path / "val").mkdir(exist_ok=True)
        picture = noise(entry["height"], entry["width"], entry["id"])
        Image.fromarray(picture).save(tmp_path / "val" / entry["file_name"])
    boxes = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 20, 30], "area": 600, "iscrowd": 0}]
    categories = [{"id": k, "name": n} for k, n in ((3, "disk"), (7, "star"), (20, "frame"))]
    write(tmp_path, {"images": images, "annotations": boxes, "categories": categories}, "val")
    return tmp_path


@pytest.mark.parametrize("kind", ["teacher", "low"])
def test_the_size_is_the_commonest_and_only_such_images_are_timed(data, kind, monkeypatch):
    model = tiny_model(kind)
    dataset = CocoDataset(annotations.read(data, "val"), (128,), 256, model.low_input)
    timed, clock = [], iter(range(1000))
    monkeypatch.setattr(CocoDataset, "__getitem__", spy(CocoDataset.__getitem__, timed))
    monkeypatch.setattr(cost, "_now", lambda device: next(clock) ** 2 / 1000)
    found = cost.measure(model, dataset, model.branches[0], images=3)
    assert found["size"] == [128, 192] and timed == [1, 1, 1, 2, 3]
    # The clock is read at 0, 1, 4, ... ms, three times an image; the first two images are the warm-up.
    assert found["ms"] == pytest.approx({"network": 19, "postprocessing": 21})
    assert found["gmacs"] == cost.gmacs(model, model.branches[0], 128, 192)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def spy(method, indices):
    def reading(self, item):
        indices.append(item[0])
        return method(self, item)

    return reading


def test_evaluate_reports_the_cost_of_every_branch(data, tmp_path):
    checkpoint.save(tmp_path / "teacher.pt", tiny_model("teacher"))
    flags = ["--ckpt", tmp_path / "teacher.pt", "--data", data, "--device", "cpu", "--precision", "fp32"]
    printed = succeed(evaluate, *flags, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found) == ["fused", "high", "low"]
    for branch, numbers in found.items():
        counted = cost.gmacs(tiny_model("teacher"), branch, 128, 192)
        assert numbers["cost"]["gmacs"] == counted and min(numbers["cost"]["ms"].values()) > 0
        assert f"{branch}: {counted['total']:.2f} GMACs" in printed and "128x192" in printed
    assert printed.count("cpu, fp32") == 3
