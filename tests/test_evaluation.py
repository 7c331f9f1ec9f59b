"""Detections -> metrics, against pycocotools used in the ordinary way, from an annotation file and a result file; and
what a detector costs, against counts by hand."""

import contextlib
import io
import json

import evaluate
import numpy as np
import pytest
import torch
from folders import annotation_path, draw_rectangles, noise, random_content, write
from helpers import CLASSES, tiny_config, tiny_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scripts import call, complaint, succeed
from torch import nn

from msad import models
from msad.data import annotations
from msad.data.dataset import CocoDataset
from msad.engine import checkpoint, cost, evaluation, export
from msad.engine.cost import PARTS, count_cost

NOTHING = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0, np.float32), "labels": np.zeros(0, np.int64)}


def by_pycocotools(data, truth, detections):
    """The twelve numbers and {class name: AP} by pycocotools from files; every class is evaluated on its own."""
    results = []
    for index, found in detections:
        for (x1, y1, x2, y2), score, label in zip(*(found[k].tolist() for k in ("boxes", "scores", "labels"))):
            ids = {"image_id": int(truth.image_ids[index]), "category_id": truth.classes[int(label)]["id"]}
            results.append(ids | {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    (data / "results.json").write_text(json.dumps(results))

    def stats(categories):
        evaluator = COCOeval(coco, coco.loadRes(str(data / "results.json")), "bbox")
        evaluator.params.catIds = categories
        for step in (evaluator.evaluate, evaluator.accumulate, evaluator.summarize):
            step()
        return evaluator.stats

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_path(data, "val")))
        classes = {c["name"]: stats([c["id"]])[0] for c in truth.classes}
        return stats(coco.getCatIds()), classes


def assert_equal(metrics, expected):
    stats, classes = expected
    assert [metrics[name] for name in evaluation.METRICS] == pytest.approx(stats.tolist(), abs=1e-12)
    assert metrics["classes"] == pytest.approx(classes, abs=1e-12)
    assert set(metrics) == {*evaluation.METRICS, "classes"}


def random_set(data, seed):
    """Annotations with crowd boxes, gaps in the ids, images without boxes, and a class that never occurs."""
    content = random_content(seed, 8, 60, sides=(200, 400))
    content["categories"].insert(1, {"id": 50, "name": "never seen"})
    for number, a in enumerate(content["annotations"]):  # a third each small, medium and of any size
        a["bbox"][2:] = [min(side, (30.25, 80.5, 400)[number % 3]) for side in a["bbox"][2:]]
        a["area"] = 0.9 * a["bbox"][2] * a["bbox"][3]
    write(data, content, "val")
    return annotations.read(data, "val")


def random_detections(truth, rng):
    """For each image some of its boxes, moved, a few twice or of a wrong class, and some out of the blue."""
    detections = []
    for index in rng.permutation(len(truth)):
        rows = truth.of_image(index)
        boxes = np.concatenate([truth.boxes[rows]] * 2)
        labels = np.concatenate([truth.labels[rows]] * 2).astype(np.int64)
        moved = boxes + rng.integers(-12, 13, boxes.shape) / 4 * rng.integers(0, 2, (len(boxes), 1))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        blue = np.sort(rng.integers(0, 200, (5, 2, 2)), axis=1).reshape(5, 4) + [0, 0, 1, 1]
        labels = np.concatenate([np.where(rng.random(len(labels)) < 0.2, 0, labels), rng.integers(0, 4, 5)])
        boxes = np.concatenate([moved, blue]).astype(np.float32)
        keep = rng.random(len(boxes)) < 0.7
        detections.append((int(index), {
            "boxes": boxes[keep], "labels": labels[keep], "scores": rng.random(keep.sum()).astype(np.float32),
        }))  # fmt: skip
    return detections


@pytest.mark.parametrize("seed", range(2))
def test_metrics_equal_pycocotools_from_files(tmp_path, seed):
    truth = random_set(tmp_path, seed)
    detections = random_detections(truth, np.random.default_rng(seed))
    metrics = evaluation.coco_metrics(truth, detections)
    assert_equal(metrics, by_pycocotools(tmp_path, truth, detections))
    assert 0.05 < metrics["AP"] < 0.95 and metrics["classes"]["never seen"] == -1
    assert all(0 < metrics[name] < 1 for name in ("APs", "APm", "APl")), "the case should be a rich one"


def test_classes_of_one_name_are_told_apart_by_their_ids(tmp_path):
    truth = random_set(tmp_path, 0)
    detections = random_detections(truth, np.random.default_rng(0))
    expected = list(evaluation.coco_metrics(truth, detections)["classes"].values())
    assert [c["id"] for c in truth.classes] == [3, 17, 50, 90] and len(set(expected)) == 4
    names = ("disk", "star", "frame", "disk")
    truth.classes = tuple(c | {"name": name} for c, name in zip(truth.classes, names))
    found = evaluation.coco_metrics(truth, detections)["classes"]
    assert found == dict(zip(("disk (id 3)", "star", "frame", "disk (id 90)"), expected))


def test_no_detections_and_nothing_to_detect(tmp_path):
    truth = random_set(tmp_path, 3)
    for found in ([], [(index, NOTHING) for index in range(len(truth))]):
        metrics = evaluation.coco_metrics(truth, found)
        assert {metrics[name] for name in evaluation.METRICS} == {0}
        assert metrics["classes"]["never seen"] == -1 and metrics["classes"]["class 3"] == 0

    content, one = random_content(3), {"boxes": np.array([[1, 2, 30, 40]]), "labels": np.array([1])}
    for entries in ([], [a | {"iscrowd": 1} for a in content["annotations"]]):
        write(tmp_path, content | {"annotations": entries}, "val")
        for found in ([], [(0, one | {"scores": np.array([0.5])})]):
            metrics = evaluation.coco_metrics(annotations.read(tmp_path, "val"), found)
            assert {metrics[name] for name in evaluation.METRICS} | set(metrics["classes"].values()) == {-1}


@pytest.mark.parametrize("kind, low", [("teacher", ""), ("low", "area"), ("conventional", "")])
def test_a_model_is_evaluated_on_every_image_in_the_files_pixels(tmp_path, kind, low):
    truth = annotations.read(draw_rectangles(tmp_path, {"val": 7}), "val")
    dataset = CocoDataset(truth, (128,), 256, low)
    model = tiny_model(kind)
    branches = sorted(model.branches)
    results = evaluation.evaluate(model, dataset, branches, batch=3)
    assert sorted(results) == branches
    for branch, (metrics, detections) in results.items():
        assert [index for index, _ in detections] == list(range(7))
        assert_equal(metrics, by_pycocotools(tmp_path, truth, detections))
        for index, found in detections:
            height, width = truth.sizes[index]
            assert len(found["boxes"]) > 5 and found["boxes"].min() >= 0
            assert (found["boxes"].max(0) <= np.array([width, height, width, height]) + 1e-3).all()
            assert found["boxes"][:, 2].max() > 0.7 * width and found["boxes"][:, 3].max() > 0.7 * height
            # The same picture, given to the model on its own.
            (alone,) = model.detect(Image.open(truth.path(index)), branch)
            np.testing.assert_allclose(np.sort(found["scores"]), np.sort(alone["scores"].numpy()), atol=1e-4)
            # Whatever has a nearly equal score may come first.
            distances = np.abs(found["boxes"][:, None] - alone["boxes"].numpy()).max(2)
            assert (distances.min(1)[: len(found["boxes"]) // 2] < 0.05).all()


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_and_counting_leave_the_model_as_it_was(tmp_path, training):
    dataset = CocoDataset(annotations.read(draw_rectangles(tmp_path, {"val": 2}), "val"), (64,), 128)
    model = models.build(tiny_config("teacher")).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluation.evaluate(model, dataset, ["high"], 2)
    count_cost(model, "fused", 64, 64)
    cost.measure_cost(model, dataset, "low")
    assert all(module.training == training for module in model.modules())
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_the_table_shows_percent_and_a_dash_for_nothing():
    metrics = dict.fromkeys(evaluation.METRICS, 0.1234) | {"AP75": 0.0, "APs": -1.0, "APl": 1.0}
    head, row = evaluation.table({"student @ low": metrics}).split("\n")
    assert head.split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert row.split() == ["student", "@", "low", "12.3", "12.3", "0.0", "-", "12.3", "100.0"]


# Cost.

BRANCHES = [("high", "high"), ("low", "low"), ("teacher", "high"), ("teacher", "low"), ("conventional", "low")]


def by_hand(model, branch, images):
    """{part: multiply-accumulates / 1e9}, counted in hooks from each layer's definition while it runs."""
    counted = dict.fromkeys((*PARTS, "fusion"), 0)

    def count(part, layer, output):
        counted[part] += output.numel() * layer.weight[0].numel() / 1e9  # products for one number of the output

    for part in counted:
        for layer in getattr(model, part, nn.Identity()).modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(lambda layer, _, output, part=part: count(part, layer, output))
    with torch.no_grad():
        model.predict(model.pyramids(images, [branch]))
    return counted


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
@pytest.mark.parametrize("kind, branch", [*BRANCHES, ("teacher", "fused")])
def test_macs_are_those_of_every_convolution_that_runs(kind, branch, head):
    model = models.build(tiny_config(kind, head=head)).eval()
    found = count_cost(model, branch, 120, 192)["gmacs"]  # padded to 128 x 192
    expected = by_hand(model, branch, torch.zeros(1, 3, *((64, 96) if kind == "low" else (128, 192))))
    assert (expected["fusion"] > 0) == (branch == "fused")
    expected["total"] = sum(expected.values())
    assert found == pytest.approx({name: expected[name] for name in (*PARTS, "total")}, rel=1e-9)


@pytest.fixture
def home(tmp_path):
    """A detector, and seven pictures, of which models that test at 128 pad four to 128 x 192 (height, width)."""
    sizes = [(64, 64), (128, 140), (128, 180), (100, 140), (192, 128), (128, 192), (30, 30)]
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(sizes, 1)]
    boxes = [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 20, 30], "area": 600, "iscrowd": 0}]
    write(tmp_path, {"images": images, "annotations": boxes, "categories": CLASSES}, "val")
    for entry in images:
        picture = noise(entry["height"], entry["width"], entry["id"])
        Image.fromarray(picture).save(tmp_path / "val" / entry["file_name"])
    checkpoint.save(tmp_path / "model.pt", tiny_model("low"))
    return tmp_path


def flags(home, *more):
    return ["--ckpt", home / "model.pt", "--data", home, "--device", "cpu", "--precision", "fp32", *more]


@pytest.mark.parametrize("kind", ["teacher", "low"])
def test_the_size_is_the_commonest_and_such_an_image_is_timed(home, kind, monkeypatch):
    model, timed = tiny_model(kind), []
    dataset = CocoDataset(annotations.read(home, "val"), (128,), 256, model.input_downsample)
    read = CocoDataset.__getitem__
    monkeypatch.setattr(CocoDataset, "__getitem__", lambda self, item: timed.append(item[0]) or read(self, item))
    monkeypatch.setattr(cost, "milliseconds", lambda part: timed.append(part()) or len(timed))
    found = cost.measure_cost(model, dataset, model.branches[0])
    assert found["size"] == [128, 192] and timed[0] == 1 and found["ms"] == {"network": 2, "postprocessing": 3}
    (pyramids, outputs), (detections,) = timed[1:]
    assert set(pyramids) == set(outputs) == {model.branches[0]} and set(detections) == {"boxes", "scores", "labels"}
    assert found["gmacs"] == count_cost(model, model.branches[0], 128, 192)["gmacs"]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_evaluate_reports_the_cost_of_every_branch(home):
    checkpoint.save(home / "model.pt", tiny_model("teacher"))
    printed = succeed(evaluate, *flags(home, "--json", home / "found.json"))
    found = json.loads((home / "found.json").read_text())
    assert sorted(found) == ["fused", "high", "low"]
    for branch, numbers in found.items():
        counted = count_cost(tiny_model("teacher"), branch, 128, 192)["gmacs"]
        assert numbers["cost"]["gmacs"] == counted and min(numbers["cost"]["ms"].values()) > 0
        assert f"{branch}: {counted['total']:.2f} GMACs" in printed and "128x192" in printed
    assert printed.count("measured on cpu, fp32, 1 thread") == 1


# Results: tried before the work, written before a word is said, and nothing that is read is written to.


@pytest.mark.parametrize("place", ["none/x.pt2", "folder.pt2"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(home, monkeypatch, place):
    for work in ((evaluation, "evaluate"), (export, "trace")):
        monkeypatch.setattr(*work, None)  # is never called
    (home / "folder.pt2").mkdir()
    for ask in (["--data", home, "--json"], ["--data", home, "--detections"], ["--export"]):
        line = complaint(evaluate, "--ckpt", home / "model.pt", "--device", "cpu", *ask, home / place)
        assert line.startswith(f"error: {home}/{place}: cannot be written")


@pytest.mark.parametrize("slip", ["model.pt", "annotations/instances_val.json", "linked.json", "result.json"])
def test_what_is_read_or_written_already_is_refused_and_stays(home, monkeypatch, slip):
    monkeypatch.setattr(evaluation, "evaluate", None)  # is never called
    (home / "linked.json").symlink_to(home / "model.pt")
    (home / "result.json").touch()
    files = set(home.iterdir())
    before = (home / slip).read_bytes()
    other = ["--json", home / "val" / ".." / "result.json"]
    line = complaint(evaluate, *flags(home, *other, "--detections", home / slip))
    assert f"{slip}: is read, or written to, by the same command" in line and (home / slip).read_bytes() == before
    assert set(home.iterdir()) == files


def test_results_are_whole_before_a_word_is_said_and_an_earlier_one_stays_until_then(home, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    (home / "a").write_text("earlier")
    more = flags(home, "--json", home / "a", "--detections", home / "b", "--draw")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", stop)
        assert call(evaluate, *more)[0] == 130 and (home / "a").read_text() == "earlier"
        assert not (home / "b").exists()
    monkeypatch.setattr(evaluate, "print", stop, raising=False)
    assert call(evaluate, *more)[0] == 130
    assert json.loads((home / "a").read_text())["low"] and json.loads((home / "b").read_text())
    assert not list((home / "pictures").iterdir()), "words come before pictures, too"
