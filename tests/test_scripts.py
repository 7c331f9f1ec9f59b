"""train.py -> distill.py -> evaluate.py for a few iterations: what they leave behind and what they print."""

import hashlib
import json
import math

import distill
import evaluate
import pytest
import torch
import train
from folders import COLORS, draw_rectangles
from scripts import SHORT, TINY, succeed

from msad import models
from msad.engine import checkpoint, evaluation
from msad.models import Conventional, Detector, Teacher

# What is trained: its script, its flags beside --data and --out, the kind of model, the branches. Students are not told
# about data and sizes: their teacher's checkpoint knows.
RUNS = {
    "teacher": (train, [], Teacher, ["fused", "high", "low"]),
    "conventional": (train, ["--no-align"], Conventional, ["high", "low"]),
    "high": (train, ["--res", "high"], Detector, ["high"]),
    "low": (train, ["--res", "low"], Detector, ["low"]),
    "student": (distill, ["--kd-ramp", "2"], Detector, ["low"]),
    "alone": (distill, ["--kd", "0"], Detector, ["low"]),
    "wider": (distill, ["--width", "0.5", "--backbone", "resnet34"], Detector, ["low"]),
    "retinanet": (train, ["--head", "retinanet"], Teacher, ["fused", "high", "low"]),
}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def line_of(home, name, start):
    """The first line a run printed that starts so."""
    return next(line for line in (home / f"{name}.txt").read_text().splitlines() if line.startswith(start))


def tensors(content):
    """All tensors in nested dictionaries, lists and tuples."""
    if torch.is_tensor(content):
        return [content]
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return [tensor for part in inner for tensor in tensors(part)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small data set in `data`, all of RUNS, and what each printed in `printed`."""
    home = tmp_path_factory.mktemp("home")
    draw_rectangles(home / "data", {"train": 16, "val": 5})
    for name, (script, flags, _, _) in RUNS.items():
        teacher = home / "teacher" / "last.pt"
        before = digest(teacher) if script is distill else None
        common = [*SHORT, "--teacher", teacher] if script is distill else [*TINY, "--data", home / "data"]
        printed = succeed(script, *common, "--out", home / name, *flags)
        (home / f"{name}.txt").write_text(printed)
        assert script is train or before == digest(teacher), "the teacher's file is as it was"
    return home


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_its_model_and_log(home, name):
    _, _, kind, branches = RUNS[name]
    assert sorted(path.name for path in (home / name).iterdir()) == ["curve.png", "last.pt", "log.jsonl", "sheet.jpg"]
    content = torch.load(home / name / "last.pt", weights_only=True)
    model = checkpoint.load(home / name / "last.pt")
    assert type(model) is kind and sorted(model.branches) == branches and not model.training
    assert content["training"]["done"] == 4 and [c["name"] for c in content["config"]["classes"]] == list(COLORS)
    assert content["training"]["settings"]["precision"] == "fp32"

    entries = read_log(home / name)
    steps = [entry for entry in entries if "iteration" in entry]
    assert [entry["iteration"] for entry in steps] == [0, 1, 2, 3]
    assert all(math.isfinite(value) for entry in steps for value in entry.values())
    # AdamW's warm-up over 2 iterations and cosine over 4, lr 0.008 for 8 images (0.003 with RetinaNet), so for 2:
    largest = 0.00075 if name == "retinanet" else 0.002
    rates = [largest * min(1, 0.001 + 0.999 * i / 2) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert [entry["lr"] for entry in steps] == pytest.approx(rates)
    assert [(e["done"], e["branch"]) for e in entries if "branch" in e] == [(n, b) for n in (2, 4) for b in branches]


@pytest.mark.parametrize("name", RUNS)
def test_the_logged_loss_is_the_weighted_sum_of_its_parts(home, name):
    for entry in read_log(home / name):
        if "iteration" in entry:
            parts = {k: v for k, v in entry.items() if k not in ("iteration", "lr", "loss")}
            total = sum(value * (0.4 if part.startswith("fused") else 1) for part, value in parts.items())
            assert entry["loss"] == pytest.approx(total, rel=1e-5)
            assert {part.split("/")[0] for part in parts} - {"kd"} == set(RUNS[name][3])


@pytest.mark.parametrize("name", RUNS)
def test_evaluate_agrees_with_what_was_logged_and_printed(home, name):
    flags = ["--ckpt", home / name / "last.pt", "--precision", "fp32", "--device", "cpu"]
    printed = succeed(evaluate, *flags, "--per-class", "--json", home / "found.json")
    found = json.loads((home / "found.json").read_text())
    kind = "student" if RUNS[name][0] is distill else name if name != "retinanet" else "teacher"
    for branch in RUNS[name][3]:
        logged = next(e for e in read_log(home / name) if e.get("branch") == branch and e["done"] == 4)
        assert {k: found[branch][k] for k in evaluation.METRICS} == {k: logged[k] for k in evaluation.METRICS}
        row = line_of(home, name, f"{kind} @ {branch}")
        assert f"\n{kind} @ {branch}\n" in printed
        assert row.split()[3:] == [evaluation.percent(found[branch][k]) for k in evaluation.METRICS[:6]]
        assert all(f"{k} {evaluation.percent(found[branch][k])}" in printed for k in evaluation.METRICS)
    assert list(found[branch]["classes"]) == list(COLORS) and all(color in printed for color in COLORS)
    if len(RUNS[name][3]) > 1:
        succeed(evaluate, *flags, "--res", "low", "--json", home / "low.json")
        alone = json.loads((home / "low.json").read_text())
        for numbers in (alone["low"], found["low"]):
            del numbers["cost"]["ms"]
        assert alone == {"low": found["low"]}


def test_evaluate_agrees_where_there_is_something_to_find(home, tmp_path):
    longer = ["--iters", 30, "--batch", 4, "--eval-every", 30, "--out"]
    succeed(train, *TINY, "--data", home / "data", *longer, tmp_path / "teacher")
    succeed(distill, *SHORT, "--teacher", tmp_path / "teacher" / "last.pt", *longer, tmp_path / "student")
    for name, branches in (("teacher", ["fused", "high", "low"]), ("student", ["low"])):
        flags = ["--precision", "fp32", "--device", "cpu", "--json", tmp_path / "found.json"]
        succeed(evaluate, "--ckpt", tmp_path / name / "last.pt", *flags)
        found = json.loads((tmp_path / "found.json").read_text())
        logged = {e.pop("branch"): e for e in read_log(tmp_path / name) if "branch" in e}
        assert sorted(found) == sorted(logged) == branches
        for branch in branches:
            assert found[branch]["AP50"] > 0.001
            assert [found[branch][k] for k in evaluation.METRICS] == [logged[branch][k] for k in evaluation.METRICS]


def test_a_student_s_file_holds_the_student_only(home):
    content = torch.load(home / "student" / "last.pt", weights_only=True)
    fresh = models.build(checkpoint.read(home / "student" / "last.pt")["config"])
    assert list(content["model"]) == list(fresh.state_dict())
    assert not any("fusion" in key or "teacher" in key or "p7" in key for key in content["model"])
    sizes = [p.numel() for p in fresh.parameters()]
    # Beside the model only AdamW's step and two moments for each of the student's parameters.
    found = sorted(tensor.numel() for tensor in tensors(content["training"]))
    assert found == sorted(2 * sizes + [1] * len(sizes))


def test_distillation_starts_from_the_teacher_and_its_loss_ramps_up(home):
    kd = [entry["kd"] for entry in read_log(home / "student") if "iteration" in entry]
    assert kd[0] == 0 and 0 < kd[1] < 0.8 * kd[2] and kd[2] > 0.1
    assert not any("kd" in entry for entry in read_log(home / "alone"))
    first = [read_log(home / name)[0] for name in ("student", "alone")]
    assert first[0]["loss"] == first[1]["loss"], "the same start, the same pictures, and no distillation yet"
    assert read_log(home / "student")[1]["loss"] != read_log(home / "alone")[1]["loss"]

    lines = {name: line_of(home, name, "student  ") for name in ("student", "wider")}
    teacher, wider = checkpoint.load(home / "teacher" / "last.pt"), checkpoint.load(home / "wider" / "last.pt")
    parts = {part: len(getattr(teacher, part).state_dict()) for part in ("backbone", "head", "fusion")}
    assert f"backbone {parts['backbone']}, " in lines["student"] and f"head {parts['head']};" in lines["student"]
    assert f"fusion {parts['fusion']}" in lines["student"] and lines["student"].endswith("new nothing")
    assert f"head {parts['head']};" in lines["wider"] and "new backbone" in lines["wider"]
    assert (wider.config.backbone, wider.config.width, wider.config.fpn_channels) == ("resnet34", 0.5, 32)


def test_the_last_line_is_the_next_command(home):
    last = {name: (home / f"{name}.txt").read_text().rstrip().splitlines()[-1] for name in RUNS}
    for name, (script, _, kind, _) in RUNS.items():
        command = "distill.py --teacher" if kind is Teacher else "evaluate.py --ckpt"
        assert last[name] == f"next: python {command} {home}/{name}/last.pt"


def test_runs_of_the_same_seed_are_the_same_to_the_bit(home, tmp_path):
    again = tmp_path / "again"
    flags = [*TINY, "--data", home / "data", "--out"]
    succeed(train, *flags, again, "--workers", 1)
    assert (again / "log.jsonl").read_bytes() == (home / "teacher" / "log.jsonl").read_bytes()
    contents = [torch.load(folder / "last.pt", weights_only=True) for folder in (home / "teacher", again)]
    first, second = (tensors([c["model"], c["training"]["optimizer"]]) for c in contents)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_another_seed_starts_from_other_weights_and_pictures(home, tmp_path):
    for seed in (0, 1):  # a learning rate of 0 leaves the weights as they were drawn
        flags = ["--iters", 1, "--lr", 0, "--seed", seed, "--out", tmp_path / str(seed)]
        succeed(train, *TINY, "--data", home / "data", *flags)
    weights = [torch.load(tmp_path / seed / "last.pt", weights_only=True)["model"] for seed in "01"]
    assert not weights[0]["backbone.conv1.weight"].equal(weights[1]["backbone.conv1.weight"])
    assert read_log(tmp_path / "0")[0]["loss"] != read_log(tmp_path / "1")[0]["loss"]


def test_a_new_run_keeps_an_earlier_one_s_files(home, tmp_path):
    flags = [*TINY, "--data", home / "data", "--out", tmp_path / "out", "--res", "low"]
    succeed(train, *flags)
    first = {name: digest(tmp_path / "out" / name) for name in ("last.pt", "log.jsonl")}
    for number in (1, 2):
        succeed(train, *flags, "--seed", number)
    kept = {path.name: digest(path) for path in (tmp_path / "out").iterdir()}
    assert len(kept) == 12 and {"curve.1.png", "curve.2.png", "sheet.1.jpg", "sheet.2.jpg"} < set(kept)
    assert len({digest for name, digest in kept.items() if name.startswith(("last", "log"))}) == 6
    assert kept["last.1.pt"] == first["last.pt"] and kept["log.1.jsonl"] == first["log.jsonl"]
