"""The comparison's numbers: .github/collect.py and results.py."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from folders import draw_rectangles
from scripts import LENGTH, in_github

from msad.data import annotations
from msad.engine import evaluation

collect, results = in_github("collect"), in_github("results")


def test_pictures_drawn_again_count_as_if_they_were_there_again(tmp_path, monkeypatch):
    """The other way: a set in which each picture stands as often as it was drawn, evaluated as any other."""
    draw_rectangles(tmp_path / "data", {"val": 6})
    found, shift = annotations.read(tmp_path / "data", "val"), np.random.default_rng(1)
    pairs = []
    for index in range(len(found)):
        boxes, labels = found.objects(index)
        moved = boxes + shift.normal(0, 4, boxes.shape).astype(np.float32)
        pairs.append((index, {"boxes": moved, "labels": labels, "scores": shift.random(len(labels))}))
    drawn = np.random.default_rng(0).integers(6, size=6).tolist()

    file = tmp_path / "data" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    images, entries = content["images"], content["annotations"]
    entries[0]["id"] = 0  # which pycocotools takes for no match
    known = json.dumps(content)
    content["images"] = [images[index] | {"id": 100 + place} for place, index in enumerate(drawn)]
    content["annotations"] = [
        entry | {"id": 1000 * place + entry["id"], "image_id": 100 + place}
        for place, index in enumerate(drawn)
        for entry in entries
        if entry["image_id"] == images[index]["id"]
    ]
    file.write_text(json.dumps(content))
    again = annotations.read(tmp_path / "data", "val")
    metrics = evaluation.coco_metrics(again, [(place, pairs[index][1]) for place, index in enumerate(drawn)])

    file.write_text(known)
    monkeypatch.setattr(collect, "RESAMPLINGS", 1)
    assert collect.resampled_ap(found, pairs) == [pytest.approx(metrics["AP"], abs=6e-5)]
    assert 0.05 < metrics["AP"] < 0.95


def test_finished_runs_become_numbers_and_these_tables(uninterrupted, tmp_path, monkeypatch, capsys):
    for seed, row, run in ((0, "teacher", "teacher"), (0, "student", "distilled"), (1, "student", "distilled")):
        shutil.copytree(uninterrupted / run, tmp_path / f"drawn-fcos-{seed}" / row)
        (tmp_path / f"drawn-fcos-{seed}" / row / "finished").touch()
    (tmp_path / "drawn-fcos-0" / "teacher" / "finished").unlink()
    monkeypatch.setattr(sys, "argv", ["collect.py", str(tmp_path), "abc", "a machine"])
    collect.main()
    one, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert one == two | {"seed": 0} and two["row"] == "student" and two["iterations"] == LENGTH
    assert len(two["resampled"]) == 200

    ap = {"student": (0.5, 0.6, 0.7), "student-alone": (0.4, 0.45, 0.5)}
    line = lambda row, seed, ap: one | {"row": row, "seed": seed, "AP": ap, "resampled": [ap - 0.01, ap]}
    lines = [json.dumps(line(row, seed, value)) for row, values in ap.items() for seed, value in enumerate(values)]
    lines += [json.dumps(line("teacher", seed, 0.9) | {"branch": "fused"}) for seed in range(3)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    results.main()
    printed = capsys.readouterr().out
    assert "| **student, the paper's L1** | 60.0 ± 10.0 |" in printed
    # Seeds: 10, 15, 20. Pictures: each resampling moves both rows alike.
    assert "| student, the paper's L1 - student without distillation | +15.0 ± 2.9 | ± 0.0 |" in printed
    rows = {("teacher", "fused"): {0: one | {"iterations": 4}}, ("low-alone", "low"): {0: one | {"iterations": 7}}}
    with pytest.raises(AssertionError, match="drawn-fcos-0/low-alone: not 8"):  # as long as teacher and student
        results.check_lengths(rows)
    with pytest.raises(AssertionError, match=r"one length: \[4, 5\]"):
        results.check_lengths({("teacher", "fused"): {0: one | {"iterations": 4}, 1: one | {"iterations": 5}}})
