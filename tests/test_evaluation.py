"""Detections -> metrics, against pycocotools used in the ordinary way: from an annotation file and a result file."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from folders import annotation_path, draw_rectangles, random_content, write
from helpers import tiny_config, tiny_model
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from msad import annotations, evaluation
from msad.models import build
from msad.data import CocoDataset

NOTHING = {"boxes": np.zeros((0, 4), np.float32), "scores": np.zeros(0, np.float32), "labels": np.zeros(0, np.int64)}


def by_pycocotools(data, truth, detections, split="val"):
    """The twelve numbers and {class name: AP} by pycocotools from files; every class is evaluated on its own."""
    results = []
    for index, found in detections:
        for (x1, y1, x2, y2), score, label in zip(*(found[k].tolist() for k in ("boxes", "scores", "labels"))):
            ids = {"image_id": int(truth.image_ids[index]), "category_id": truth.classes[int(label)]["id"]}
            results.append(ids | {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    path = data / "results.json"
    path.write_text(json.dumps(results))

    def stats(categories):
        evaluator = COCOeval(coco, coco.loadRes(str(path)), "bbox")
        evaluator.params.catIds = categories
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        return evaluator.stats

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_path(data, split)))
        classes = {c["name"]: stats([c["id"]])[0] for c in truth.classes}
        return stats(coco.getCatIds()), classes


def assert_equal(metrics, expected):
    stats, classes = expected
    assert [metrics[name] for name in evaluation.METRICS] == pytest.approx(stats.tolist(), abs=1e-12)
    assert metrics["classes"] == pytest.approx(classes, abs=1e-12)
    assert set(metrics) == {*evaluation.METRICS, "classes"}


def random_set(data, seed, boxes=60):
    """Annotations with crowd boxes, gaps in the ids, images without boxes, and a class that never occurs."""
    content = random_content(seed, 8, boxes, sides=(200, 400))
    content["categories"].insert(1, {"id": 50, "name": "never seen"})
    for number, a in enumerate(content["annotations"]):  # a third each small, medium and of any size
        a["bbox"][2:] = [min(side, (30.25, 80.5, 400)[number % 3]) for side in a["bbox"][2:]]
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


def perfect(truth):
    """Each box that is no crowd; scores differ, for pycocotools breaks ties by image id."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(len(truth)):
        rows = truth.of_image(index)
        real = ~truth.crowd[rows]
        boxes, labels = truth.boxes[rows][real], truth.labels[rows][real].astype(np.int64)
        found.append((index, {"boxes": boxes, "labels": labels, "scores": rng.random(len(boxes))}))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_pycocotools_from_files(tmp_path, seed):
    truth = random_set(tmp_path, seed)
    detections = random_detections(truth, np.random.default_rng(seed))
    metrics = evaluation.coco_metrics(truth, detections)
    assert_equal(metrics, by_pycocotools(tmp_path, truth, detections))
    assert 0.05 < metrics["AP"] < 0.95 and metrics["classes"]["never seen"] == -1
    assert all(0 < metrics[name] < 1 for name in ("APs", "APm", "APl")), "the case should be a rich one"


def test_perfect_detections_give_ap_1(tmp_path):
    truth = random_set(tmp_path, 7)
    metrics = evaluation.coco_metrics(truth, perfect(truth))
    assert [metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")] == pytest.approx([1] * 7)
    present = {truth.classes[k]["name"] for k in set(truth.labels[~truth.crowd].tolist())}
    assert {name for name, value in metrics["classes"].items() if value == pytest.approx(1)} == present


def test_a_duplicate_a_miss_and_a_wrong_class_cost_what_they_should(tmp_path):
    truth = random_set(tmp_path, 7)
    complete = perfect(truth)
    index, found = max(complete, key=lambda pair: len(pair[1]["boxes"]))
    label = int(found["labels"][0])
    other = next(k for k in set(truth.labels.tolist()) if k != label)
    complete[index] = (index, found | {"labels": np.array([other, *found["labels"][1:]])})
    metrics = evaluation.coco_metrics(truth, complete)
    assert metrics["AP"] < 1 and metrics["classes"][truth.classes[label]["name"]] < 1
    assert_equal(metrics, by_pycocotools(tmp_path, truth, complete))


def test_no_detections_and_nothing_to_detect(tmp_path):
    truth = random_set(tmp_path, 3)
    for nothing in ([], [(index, NOTHING) for index in range(len(truth))]):
        metrics = evaluation.coco_metrics(truth, nothing)
        assert {metrics[name] for name in evaluation.METRICS} == {0}
        assert metrics["classes"]["never seen"] == -1 and metrics["classes"]["class 3"] == 0

    for split, crowd in (("empty", None), ("crowded", 1)):
        content = random_content(3)
        content["annotations"] = [a | {"iscrowd": 1} for a in content["annotations"]] if crowd else []
        write(tmp_path, content, f"val_{split}")
        (annotation_path(tmp_path, "val")).unlink(missing_ok=True)
        truth = annotations.read(tmp_path, f"val_{split}")
        detections = [(0, {"boxes": np.array([[1, 2, 30, 40]]), "labels": np.array([1]), "scores": np.array([0.5])})]
        for found in ([], detections):
            metrics = evaluation.coco_metrics(truth, found)
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
            image, _, _, _ = dataset[index, 0]
            alone = model.detect([image.float() / 255], branch, resize=False)[0]
            scale = torch.tensor([width, height] * 2) / torch.tensor(image.shape[:0:-1]).repeat(2)
            np.testing.assert_allclose(np.sort(found["scores"]), np.sort(alone["scores"].numpy()), atol=1e-4)
            np.testing.assert_allclose(found["boxes"][0], alone["boxes"][0] * scale, atol=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(tmp_path, training):
    truth = annotations.read(draw_rectangles(tmp_path, {"val": 2}), "val")
    model = build(tiny_config("high")).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluation.evaluate(model, CocoDataset(truth, (64,), 128), ["high"], 2)
    assert model.training == training and all(module.training == training for module in model.modules())
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_the_table_shows_percent_and_a_dash_for_nothing():
    metrics = dict.fromkeys(evaluation.METRICS, 0.1234) | {"APs": -1.0, "APl": 1.0}
    head, row = evaluation.table({"student @ low": metrics}).split("\n")
    assert head.split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert row.split() == ["student", "@", "low", "12.3", "12.3", "12.3", "-", "12.3", "100.0"]
