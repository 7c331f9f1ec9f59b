"""Where settings come from: what was typed, the teacher's checkpoint, the recipe; and data that is named only once."""

import math
import shlex
import shutil

import distill
import evaluate
import pytest
import torch
import train
from folders import draw_rectangles
from helpers import tiny_config
from scripts import SHORT, complaint, succeed

from msad.data import shapes
from msad.engine import checkpoint, settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

INHERITED = {  # setting -> a value that neither recipe has, in the teacher's checkpoint, and another one, typed
    "data": ("of the teacher", "typed"),
    "recipe": ("small", "coco"),
    "short_sides": ([64, 96], [128]),
    "test_side": (320, 640),
    "long_side": (600, 700),
    "pad": (128, 256),
    "downsample": ("nearest", "area"),
    "head": ("retinanet", "fcos"),
    "backbone": ("resnet101", "resnet34"),
    "width": (0.75, 0.5),
    "fpn_channels": (96, 128),
    "head_channels": (160, 96),
    "head_convs": (3, 5),
    "object_scale": (0.5, 0.8),
}


def teacher_content(**changes):
    """What a teacher's checkpoint says of the settings above."""
    values = {name: value for name, (value, _) in INHERITED.items()} | changes
    run = ("data", "recipe", "short_sides")
    config = {name: value for name, value in values.items() if name not in (*run, "test_side")}
    stored = settings.COCO | {"iters": 77, "lr": 0.5, "seed": 9} | {name: values[name] for name in run}
    config = tiny_config("teacher", short_side=values["test_side"], **config)
    return {"config": config, "training": {"settings": stored}}


@pytest.mark.parametrize("known, photos, device, recipe, reason", [
    ({}, 9, CUDA, "small", ""),
    ({"data": "d", "recipe": "small"}, 9, CUDA, "small", ""),
    ({"data": "d"}, 90_000, CPU, "laptop", " and no GPU; with one, --recipe photos is better"),
    ({"data": "d"}, 19_999, CUDA, "photos", "; --recipe takes another"),
    ({"data": "d"}, 20_000, CUDA, "coco", "; --recipe takes another"),
])  # fmt: skip
def test_a_recipe_is_chosen_by_data_and_device_unless_it_is_typed(capsys, known, photos, device, recipe, reason):
    own = {"res": "multi", "no_align": False, "recipe": recipe, "precision": "fp32", "seed": 5}
    found = vars(settings.settle(known | {"seed": 5, "precision": "fp32"}, train.OWN, photos, device))
    length = {name: found[name] for name in ("iters", "eval_every") if recipe in settings.LENGTHS}
    assert found == settings.COCO | settings.RECIPES[recipe] | known | own | length
    line = f"recipe    {recipe}, chosen for {photos} training photos with boxes{reason}\n"
    assert capsys.readouterr().out == (line if reason else "")


@pytest.mark.parametrize(  # so many epochs of the photos, and bounds in iterations
    "recipe, count, typed, iters, ramp",
    [
        ("photos", 300, {}, 3000, 150),
        ("photos", 510, {"batch": 4}, 4590, 229),
        ("photos", 19_999, {}, 30_000, 1500),
        ("photos", 510, {"iters": 100}, 100, 5),
        ("photos", 510, {"iters": 100, "kd_ramp": 7}, 100, 7),
        ("laptop", 3000, {}, 4500, 225),
    ],
)
def test_the_length_of_a_run_on_photos_follows_from_their_number(recipe, count, typed, iters, ramp):
    stored = {"recipe": recipe, "data": "d", "short_sides": [64]}
    inherited = settings.inherit(teacher_content() | {"training": {"settings": stored}}, "t.pt")
    found = settings.settle(inherited | typed, distill.OWN, count, CPU)
    assert (found.iters, found.kd_ramp, found.eval_every) == (iters, ramp, math.ceil(iters / 4))
    assert settings.settle({"recipe": recipe} | typed, train.OWN, count, CPU).iters == iters


@pytest.mark.parametrize("typed, expected", [
    # Statistics of BatchNorm stay only where there are some.
    ({"recipe": "photos"}, {"norm": "frozen"}),
    ({"recipe": "photos", "weights": "none"}, {"norm": "sync"}),
    ({"recipe": "photos", "weights": "none", "norm": "local"}, {"norm": "local"}),
    # The learning rate is in proportion to the batch unless it is typed.
    ({"batch": 2}, {"lr": 0.008 / 4, "iters": 1200}),
    ({"batch": 2, "lr": 0.7}, {"lr": 0.7}),
    ({"recipe": "coco", "batch": 32}, {"lr": 0.02}),
    # A small RetinaNet takes smaller steps, and more of them.
    ({"head": "retinanet"}, {"iters": 2000, "eval_every": 1000, "lr": 0.003}),
    ({"head": "retinanet", "batch": 4, "iters": 7}, {"iters": 7, "lr": 0.0015}),
    ({"head": "retinanet", "recipe": "coco"}, {"iters": 90_000, "lr": 0.01}),
])  # fmt: skip
def test_what_follows_from_what_is_typed(typed, expected):
    teacher = settings.inherit(teacher_content(head="fcos"), "t.pt")
    for script, inherited in ((train, {}), (distill, teacher)):  # a teacher's run was of the small recipe
        found = vars(settings.settle(inherited | typed, script.OWN, 300, CPU))
        assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_student_inherits_data_and_network_and_nothing_else_of_its_teacher_s_run():
    known = settings.inherit(teacher_content(), "t.pt") | {"teacher": "t.pt", "precision": "bf16"}
    found = vars(settings.settle(known, distill.OWN, 300, CPU))
    assert {name: found[name] for name in INHERITED} == {name: value for name, (value, _) in INHERITED.items()}
    own = {"teacher": "t.pt", "kd_loss": "l1", "kd": 0.6, "kd_ramp": 500, "weights": "teacher", "precision": "bf16"}
    rest = {name: value for name, value in found.items() if name not in INHERITED}
    expected = settings.COCO | settings.SMALL | settings.SMALL_RETINANET | own
    assert rest == {name: value for name, value in expected.items() if name not in INHERITED}


@pytest.mark.parametrize("name", INHERITED)
def test_what_is_typed_wins_over_what_is_inherited(name):
    typed = {name: INHERITED[name][1]}
    found = vars(settings.settle(settings.inherit(teacher_content(), "t.pt") | typed, distill.OWN, 300, CPU))
    expected = {other: value for other, (value, _) in INHERITED.items()} | typed
    assert {other: found[other] for other in INHERITED} == expected


def test_a_teacher_without_a_run_gives_its_network_only():
    known = settings.inherit(teacher_content() | {"training": None}, "t.pt") | {"data": "d"}
    found = settings.settle(known, distill.OWN, 20_000, CUDA)
    assert (found.data, found.recipe, found.short_sides) == ("d", "coco", settings.COCO["short_sides"])
    assert (found.test_side, found.backbone, found.width) == (320, "resnet101", 0.75)


def test_data_that_has_moved_is_one_line_and_can_be_said(uninterrupted, tmp_path):
    moved, folder = tmp_path / "moved", tmp_path / "runs"
    shutil.copytree(uninterrupted, folder)
    (folder / "data").rename(moved)
    paths = {name: folder / name / "last.pt" for name in ("teacher", "trained", "distilled")}
    for path in paths.values():
        content = torch.load(path, weights_only=True)
        content["training"]["settings"]["data"] = str(tmp_path / "before")
        torch.save(content, path)
    for script, flags in (
        (evaluate, ["--ckpt", paths["distilled"], "--device", "cpu"]),
        (distill, [*SHORT, "--iters", 1, "--teacher", paths["teacher"], "--out", tmp_path / "out"]),
        (train, ["--resume", "--out", folder / "trained"]),
    ):
        line = complaint(script, *flags)
        assert f"{tmp_path}/before/annotations/" in line and "--data" in line
        succeed(script, *flags, "--data", moved)
    assert checkpoint.read(tmp_path / "out" / "last.pt")["training"]["settings"]["data"] == str(moved)


SOON = {  # a small recipe that is over soon
    "short_sides": [128], "test_side": 128, "long_side": 128, "fpn_channels": 32, "head_convs": 1, "iters": 2,
    "batch": 2, "warmup": 1,
}  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--data", "photos", "--recipe", "small", "--out", "my runs/it's"]])
def test_the_next_commands_run_as_they_are_printed(tmp_path, monkeypatch, flags):
    """From train.py to distill.py to evaluate.py; data and recipe are typed once or not at all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "TRAIN", 6)
    monkeypatch.setattr(shapes, "VAL", 3)
    for name, value in SOON.items():
        monkeypatch.setitem(settings.SMALL, name, value)
    draw_rectangles("photos", {"train": 6, "val": 2})
    command = ["python", "train.py", *flags]
    for script in (train, distill, evaluate):
        assert command[:2] == ["python", f"{script.__name__}.py"]
        printed = succeed(script, *command[2:])
        command = shlex.split(printed.splitlines()[-1].removeprefix("next: "))
    assert ("; 2 images (" if flags else "; 3 images (") in printed
