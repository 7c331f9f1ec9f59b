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
    "student": (distill, ["--kd-ramp", "10"], Detector, ["low"]),
    "alone": (distill, ["--kd", "0"], Detector, ["low"]),
    "wider": (distill, ["--width", "0.5", "--backbone", "resnet34"], Detector, ["low"]),
    "retinanet": (train, ["--head", "retinanet"], Teacher, ["fused", "high", "low"]),
}

LENGTHS = {"teacher": (30, 4), "student": (30, 4), "alone": (4, 4)}  # iterations and batch, where not (4, 2)


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
    """A folder with a small data set in `data`, all of RUNS, and what each printed in a file of its name."""
    home = tmp_path_factory.mktemp("home")
    draw_rectangles(home / "data", {"train": 16, "val": 5})
    for name, (script, flags, _, _) in RUNS.items():
        teacher = home / "teacher" / "last.pt"
        before = digest(teacher) if script is distill else None
        common = [*SHORT, "--teacher", teacher] if script is distill else [*TINY, "--data", home / "data"]
        iters, batch = LENGTHS.get(name, (4, 2))
        length = ["--iters", iters, "--batch", batch, "--eval-every", iters // 2]
        printed = succeed(script, *common, *length, "--out", home / name, *flags)
        (home / f"{name}.txt").write_text(printed)
        assert script is train or before == digest(teacher), "the teacher's file is as it was"
    return home


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_its_model_and_log_and_names_the_next_command(home, name):
    script, _, kind, branches = RUNS[name]
    count, batch = LENGTHS.get(name, (4, 2))
    assert sorted(path.name for path in (home / name).iterdir()) == ["last.pt", "log.jsonl", "sheet.jpg"]
    content = torch.load(home / name / "last.pt", weights_only=True)
    model = checkpoint.load(home / name / "last.pt")
    assert type(model) is kind and sorted(model.branches) == branches and not model.training
    assert content["training"]["done"] == count and [c["name"] for c in content["config"]["classes"]] == list(COLORS)
    assert content["training"]["settings"]["precision"] == "fp32"
    command = "distill.py --teacher" if kind is Teacher else "evaluate.py --ckpt"
    assert (home / f"{name}.txt").read_text().endswith(f"\nnext: python {command} {home}/{name}/last.pt\n")

    entries = read_log(home / name)
    steps = [entry for entry in entries if "iteration" in entry]
    assert [entry["iteration"] for entry in steps] == list(range(count))
    # AdamW's warm-up over 2 iterations and a cosine, from lr 0.008 for 8 images, 0.003 with RetinaNet.
    largest = (0.003 if name == "retinanet" else 0.008) * batch / 8
    rates = [min(1, 0.001 + 0.999 * i / 2) * (1 + math.cos(math.pi * i / count)) / 2 for i in range(count)]
    assert [entry.pop("lr") for entry in steps] == pytest.approx([largest * rate for rate in rates])
    evaluated = [(entry["done"], entry["branch"]) for entry in entries if "branch" in entry]
    assert evaluated == [(n, branch) for n in (count // 2, count) for branch in branches]
    for entry in steps:  # the loss is the weighted sum of its parts
        loss = entry.pop("loss")
        del entry["iteration"]
        total = sum(value * (0.4 if part.startswith("fused") else 1) for part, value in entry.items())
        assert math.isfinite(loss) and loss == pytest.approx(total, rel=1e-5)
        assert {part.split("/")[0] for part in entry} - {"kd"} == set(branches)


@pytest.mark.parametrize("name", ["teacher", "conventional", "student", "retinanet"])
def test_evaluate_agrees_with_what_was_logged_and_printed(home, name):
    flags = ["--ckpt", home / name / "last.pt", "--precision", "fp32", "--device", "cpu"]
    printed = succeed(evaluate, *flags, "--per-class", "--json", home / "found.json")
    found = json.loads((home / "found.json").read_text())
    kind = name if name != "retinanet" else "teacher"
    logged = {e["branch"]: e for e in read_log(home / name) if "branch" in e}  # the last of each branch
    assert sorted(found) == sorted(logged) == RUNS[name][3]
    for branch, numbers in found.items():
        assert {k: numbers[k] for k in evaluation.METRICS} == {k: logged[branch][k] for k in evaluation.METRICS}
        assert name not in LENGTHS or numbers["AP50"] > 0.001, "where there is something to find"
        row = line_of(home, name, f"{kind} @ {branch}")
        assert f"\n{kind} @ {branch}\n" in printed
        assert row.split()[3:] == [evaluation.percent(numbers[k]) for k in evaluation.METRICS[:6]]
        assert all(f"{k} {evaluation.percent(numbers[k])}" in printed for k in evaluation.METRICS)
        assert list(numbers["classes"]) == list(COLORS) and all(color in printed for color in COLORS)
    if name == "teacher":
        succeed(evaluate, *flags, "--res", "low", "--json", home / "low.json")
        alone = json.loads((home / "low.json").read_text())
        for numbers in (alone["low"], found["low"]):
            del numbers["cost"]["ms"]
        assert alone == {"low": found["low"]}


def test_a_student_s_file_holds_the_student_only_and_what_it_was_not_told_is_its_teacher_s(home):
    stored = {name: checkpoint.read(home / name / "last.pt") for name in ("teacher", "student")}
    assert vars(stored["student"]["config"]) == vars(stored["teacher"]["config"]) | {"kind": "low"}
    for name in ("data", "recipe", "short_sides", "test_side"):
        values = [content["training"]["settings"][name] for content in stored.values()]
        assert values[0] == values[1], name

    content = torch.load(home / "student" / "last.pt", weights_only=True)
    fresh = models.build(stored["student"]["config"])
    assert list(content["model"]) == list(fresh.state_dict())
    assert not any("fusion" in key or "teacher" in key or "p7" in key for key in content["model"])
    sizes = [p.numel() for p in fresh.parameters()]
    # Beside the model only AdamW's step and two moments for each of the student's parameters.
    found = sorted(tensor.numel() for tensor in tensors(content["training"]))
    assert found == sorted(2 * sizes + [1] * len(sizes))


def test_distillation_starts_from_the_teacher_and_its_loss_ramps_up(home):
    kd = [entry["kd"] for entry in read_log(home / "student") if "iteration" in entry]
    assert kd[0] == 0 < kd[1] < 0.5 * kd[10] and kd[10] > 0.1
    assert not any("kd" in entry for entry in read_log(home / "alone"))
    first = [read_log(home / name)[0] for name in ("student", "alone")]
    assert first[0]["loss"] == first[1]["loss"], "the same start, the same pictures, and no distillation yet"
    assert read_log(home / "student")[1]["loss"] != read_log(home / "alone")[1]["loss"]

    lines = {name: line_of(home, name, "student  ") for name in ("student", "wider")}
    teacher, wider = checkpoint.load(home / "teacher" / "last.pt"), checkpoint.load(home / "wider" / "last.pt")
    left = 2 + len(teacher.fusion.state_dict())  # P7's convolution, and the gate
    assert lines["student"].endswith(f" {len(teacher.state_dict()) - left} tensors; left behind {left}; new 0")
    taken = int(lines["wider"].split(" tensors; ")[0].split()[-1])
    assert taken >= len(teacher.head.state_dict()) and not lines["wider"].endswith("new 0")
    assert (wider.config.backbone, wider.config.width, wider.config.fpn_channels) == ("resnet34", 0.5, 32)


def test_runs_of_the_same_seed_are_the_same_to_the_bit_and_others_are_not(home, tmp_path):
    flags = [*TINY, "--data", home / "data", "--no-align", "--out"]
    succeed(train, *flags, tmp_path / "again", "--workers", 1)
    assert (tmp_path / "again" / "log.jsonl").read_bytes() == (home / "conventional" / "log.jsonl").read_bytes()
    folders = home / "conventional", tmp_path / "again"
    contents = [torch.load(folder / "last.pt", weights_only=True) for folder in folders]
    first, second = (tensors([c["model"], c["training"]["optimizer"]]) for c in contents)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))

    for seed in "01":  # a learning rate of 0 leaves the weights as they were drawn
        succeed(train, *flags, tmp_path / seed, "--iters", 1, "--lr", 0, "--seed", seed)
    weights = [torch.load(tmp_path / seed / "last.pt", weights_only=True)["model"] for seed in "01"]
    assert not weights[0]["backbone.conv1.weight"].equal(weights[1]["backbone.conv1.weight"])
    assert read_log(tmp_path / "0")[0]["loss"] != read_log(tmp_path / "1")[0]["loss"]


def test_a_new_run_keeps_an_earlier_one_s_files(home, tmp_path):
    out = tmp_path / "out"
    flags = [*TINY, "--data", home / "data", "--out", out, "--res", "low", "--iters", 1]
    succeed(train, *flags)
    first = {name: digest(out / name) for name in ("last.pt", "log.jsonl")}
    for seed in (1, 2):
        succeed(train, *flags, "--seed", seed)
    kept = {path.name: digest(path) for path in out.iterdir()}
    assert len(kept) == 9 and {"sheet.1.jpg", "sheet.2.jpg"} < set(kept)
    assert len({digest for name, digest in kept.items() if name.startswith(("last", "log"))}) == 6
    assert kept["last.1.pt"] == first["last.pt"] and kept["log.1.jsonl"] == first["log.jsonl"]
    (out / "last.pt").unlink()
    succeed(train, *flags, "--resume")  # which begins anew
    assert digest(out / "log.3.jsonl") == kept["log.jsonl"]
