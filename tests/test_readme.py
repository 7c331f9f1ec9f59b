"""What the README says is so: the shapes it prints, the files it names, the commands it gives."""

import os
import re
import shlex
import subprocess
import sys

import distill
import evaluate
import torch
import train
from PIL import Image
from scripts import ROOT, TINY, succeed

from msad import align, models, settings, shapes
from msad.detector import ModelConfig

README = (ROOT / "README.md").read_text()
INSTALL, COMPARISON = "pip install -r requirements.txt", ".github/comparison.sh fcos 0"
PHOTOS = f"{COMPARISON} photos"
SCRIPTS = {"train.py": train, "distill.py": distill, "evaluate.py": evaluate}


def commands():
    """All lines of the README's blocks that call Python or a shell script, without their comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line[:1] not in "@} "]


def printed(row):
    """The cells of a row of the table of shapes, each a list of shapes."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row} |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    return [[tuple(map(int, shape.split("×"))) for shape in re.findall(r"\d+(?:×\d+)+", cell)] for cell in cells]


@torch.no_grad()
def test_the_table_of_shapes_is_what_one_image_becomes():
    classes = tuple({"id": k, "name": str(k)} for k in range(80))
    teacher = models.build(ModelConfig("teacher", classes)).to("meta")
    student = models.build(ModelConfig("low", classes)).to("meta")
    assert teacher.padded_size((800, 1333)) == (832, 1344)
    high = torch.empty(1, 3, 832, 1344, device="meta")
    low = align.downsample(high)
    shape = lambda tensors: [tuple(t.shape[1:]) for t in tensors]

    assert printed("image") == [shape([high]), shape([low])]
    assert printed("C2 to C5") == [shape(teacher.backbone(high)), shape(student.backbone(low))]
    pyramids, outputs = teacher(high)
    lows, low_outputs = student(low)
    assert printed("maps")[0] == shape(pyramids["high"]) == shape(pyramids["low"]) == shape(lows["low"])
    assert printed("fused")[0] == shape(pyramids["fused"])
    weights = [teacher.fusion.weights(h, l) for h, l in zip(pyramids["high"], pyramids["low"])]
    assert "| gate | 5 levels × 2 weights |" in README and shape(weights) == [(2,)] * 5
    for row in ("logits", "boxes"):
        assert printed(row)[0] == shape([outputs["fused"][row]]) == shape([low_outputs["low"][row]])


def test_files_and_pictures_that_are_named_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) > 8
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_command_runs_or_is_marked_as_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "TRAIN", 6)
    monkeypatch.setattr(shapes, "VAL", 3)
    known = []
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (90, 60)).save(tmp_path / "photos" / "one.png")
    for command in dict.fromkeys(commands()):
        if "/path/to/" in command:
            (section,) = [text for text in README.split("\n## ") if command in text]
            assert re.search(r"\*\*not run (on COCO )?here", section, re.I)
            continue
        program, *flags = shlex.split(command)
        if program == "python" and flags[0] in SCRIPTS:
            known.append(command)
            script, flags = SCRIPTS[flags[0]], flags[1:]
            if "DIR" in flags:
                flags[flags.index("DIR")] = "data/shapes"
            succeed(script, *flags, *([] if script is evaluate else TINY))
        else:
            assert command in (INSTALL, "python -m pytest", COMPARISON, PHOTOS), command
    assert len(known) >= 6


def test_the_comparison_s_script_makes_calls_that_the_scripts_understand(tmp_path):
    """A stand-in for Python writes down how it is called."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> calls\nmkdir -p "$3"\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for _ in range(2):  # the second time everything is there already
        for command in (COMPARISON, PHOTOS):
            script, *arguments = command.split()
            subprocess.run([ROOT / script, *arguments], cwd=tmp_path, env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(set(calls)) >= 14
    assert sum("--data photos --recipe small" in call for call in calls) >= 6
    for call in calls:
        name, *flags = call.split()
        before, sys.argv = sys.argv, [name, *flags]
        given, resumed = settings.parse(SCRIPTS[name].Settings, "")
        sys.argv = before
        settings.check_settings(settings.settle(SCRIPTS[name].Settings, given))
        assert resumed and given["head"] == "fcos" and given["seed"] == 0
