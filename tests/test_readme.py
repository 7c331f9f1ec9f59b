"""What the README and its two companions say is so: shapes, links, excerpts, flags, commands and what they print."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import distill
import evaluate
import pytest
import torch
import train
from PIL import Image
from scripts import ROOT, TINY, call, succeed

from msad import align, models
from msad.data import shapes
from msad.engine import export, settings

DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", ".github/RESULTS.md", ".github/NOTES.md")}
SCRIPTS = {"train.py": train, "distill.py": distill, "evaluate.py": evaluate}
COMPARISON = ".github/comparison.sh fcos 0"
PHOTOS = f"{COMPARISON} photos"
TESTED_ELSEWHERE = ("python -m pytest", COMPARISON, PHOTOS)  # by .ci/run, and below


def blocks(text, language):
    """All code blocks of a language: [(the paragraph before it, its lines)]."""
    found = re.findall(r"((?:[^\n]+\n)*)\n```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [(before, code.splitlines()) for before, name, code in found if name == language]


def parse(command):
    """A call of one of the scripts -> its module and what its parser makes of the flags."""
    words = shlex.split(command)
    (at,) = [number for number, word in enumerate(words) if word in SCRIPTS]
    script = SCRIPTS[words[at]]
    before, sys.argv = sys.argv, words[at:]
    try:
        return script, evaluate.parse() if script is evaluate else settings.parse_flags(script.__doc__, script.OWN)
    finally:
        sys.argv = before


def printed(row):
    """The cells of a row of the table of shapes, each a list of shapes."""
    (line,) = [line for line in DOCUMENTS[".github/NOTES.md"].splitlines() if line.startswith(f"| {row} |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    return [[tuple(map(int, shape.split("×"))) for shape in re.findall(r"\d+(?:×\d+)+", cell)] for cell in cells]


@torch.no_grad()
def test_the_table_of_shapes_is_what_one_image_becomes():
    classes = tuple({"id": k, "name": str(k)} for k in range(80))
    teacher, student = (models.build(models.ModelConfig(kind, classes)).to("meta") for kind in ("teacher", "low"))
    assert teacher.padded_size((800, 1333)) == (832, 1344)
    high = torch.empty(1, 3, 832, 1344, device="meta")
    low = align.downsample(high)
    shape = lambda tensors: [tuple(t.shape[1:]) for t in tensors]

    (pyramids, outputs), (lows, low_outputs) = teacher(high), student(low)
    assert printed("image") == [shape([high]), shape([low])]
    assert printed("C2 to C5") == [shape(teacher.backbone(high)), shape(student.backbone(low))]
    assert printed("maps")[0] == shape(pyramids["high"]) == shape(pyramids["low"]) == shape(lows["low"])
    assert printed("fused")[0] == shape(pyramids["fused"])
    weights = [teacher.fusion.weights(h, l) for h, l in zip(pyramids["high"], pyramids["low"])]
    assert "| gate | 5 levels × 2 weights |" in DOCUMENTS[".github/NOTES.md"] and shape(weights) == [(2,)] * 5
    for row in ("logits", "distances"):
        assert printed(row)[0] == shape([outputs["fused"][row]]) == shape([low_outputs["low"][row]])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_linked_is_there(name):
    """Files, pictures and headings."""
    links = re.findall(r'\]\((?!http)([^)]+)\)|src="([^"]+)"', DOCUMENTS[name])
    assert len(links) > 3
    for link in map("".join, links):
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_the_map_of_the_code_names_every_file():
    text = DOCUMENTS["README.md"].split("## Reading the code")[1].split("\n## ")[0]
    named = re.findall(r"`(?:msad/)?(?:data/|engine/)?(\w+\.py)`", text)
    folders = [ROOT, ROOT / "msad", ROOT / "msad" / "data", ROOT / "msad" / "engine"]
    files = [path.name for folder in folders for path in folder.glob("*.py")]
    assert sorted(named) == sorted(set(files) - {"__init__.py"})


def test_excerpts_are_the_source_s_own_lines():
    """A comment names the file; its lines follow one another there as they do here, except where `...` stands."""
    excerpts = 0
    for _, lines in blocks(DOCUMENTS["README.md"], "python"):
        parts = re.split(r"^# ([\w/]+\.py)\b.*$", "\n".join(lines), flags=re.M)
        for path, code in zip(parts[1::2], parts[2::2]):
            source, at = (ROOT / path).read_text().splitlines(), 0
            for chunk in re.split(r"^\.\.\.$", code, flags=re.M):
                wanted = chunk.strip("\n")
                count = wanted.count("\n") + 1
                places = [i for i in range(at, len(source)) if dedent("\n".join(source[i : i + count])) == wanted]
                assert wanted and places, (path, wanted)
                at = places[0] + count
            excerpts += 1
    assert excerpts >= 5


def test_flags_that_are_named_exist():
    helps = [call(script, "--help")[1] for script in SCRIPTS.values()]
    helps.append((ROOT / ".github" / "benchmark" / "benchmark.py").read_text())
    known = set(re.findall(r"--[a-z][a-z_-]+", "".join(helps)))
    known |= {"--nproc_per_node", "--ipc"}  # torchrun's, Docker's
    for text in DOCUMENTS.values():
        assert set(re.findall(r"--[a-z][a-z_-]+", text)) <= known
        for span in re.findall(r"`([^`\n]+)`", text):
            if span.removeprefix("python ").split(" --")[0] in SCRIPTS and " --" in span:
                parse(span)


def pattern(line):
    """What matches a printed line whatever its numbers, its precision and the width of its columns."""
    line = re.sub(r"(?<![^ ])-(?![^ ])|\d[\d.]*", "0", line.replace("fp32", "bf16"))
    return " ".join(line.split())


def test_commands_and_examples_run_and_print_what_is_shown_or_are_marked_as_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "TRAIN", 6)
    monkeypatch.setattr(shapes, "VAL", 3)
    program = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    monkeypatch.setattr(export, "trace", lambda _: program)  # the model's own takes long, and has its tests
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (90, 60)).save(tmp_path / "photos" / "one.png")
    outputs, not_run = {}, []
    for text in DOCUMENTS.values():
        for before, commands in blocks(text, ""):
            for command in commands:
                command = command.split(" && ")[-1]  # after the set-up
                if "**not run" in before.lower():
                    not_run.append(parse(command))
                elif command not in TESTED_ELSEWHERE:
                    script, _ = parse(command)
                    flags = [flag.replace("DIR", "data/shapes") for flag in shlex.split(command)[2:]]
                    tiny = [] if script is evaluate else [*TINY, "--iters", "5"]
                    outputs.setdefault(command, succeed(script, *flags, *tiny))
    assert len(outputs) >= 6 and len(not_run) >= 2

    ((_, lines),) = blocks(DOCUMENTS["README.md"], "text")
    shown = 0
    for line in lines:
        if line.startswith("$ "):
            real = [pattern(other) for other in outputs[line[2:]].splitlines()]
        elif line not in ("", "..."):
            wanted = ".*".join(map(re.escape, pattern(line).split("...")))
            assert any(re.fullmatch(wanted, other) for other in real), line
            shown += 1
    assert shown >= 8

    # The example in Python, whatever is no excerpt.
    found = {"image": torch.rand(3, 60, 90)}
    (example,) = [lines for _, lines in blocks(DOCUMENTS["README.md"], "python") if lines[0].startswith("import")]
    exec("\n".join(example), found)
    assert [set(detections) for detections in found["detections"]] == [{"boxes", "scores", "labels"}]


@pytest.fixture
def called(tmp_path):
    """A function that runs a script of .github with a stand-in for Python, which does `lines` -> the job, its calls."""

    def run(lines, script, *arguments):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho "$@" >> calls\n{lines}\n')
        python.chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = [ROOT / ".github" / script, *arguments]
        job = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return job, (tmp_path / "calls").read_text().splitlines()

    return run


def test_the_comparison_s_script_makes_calls_that_the_scripts_understand(called):
    for _ in range(2):  # the second time everything is there already
        for arguments in ("fcos 0", "fcos 0 photos --width 0.5"):
            log = 'mkdir -p "$3"; echo \'{"done": 7, "AP": 0.1}\' > "$3/log.jsonl"'
            job, calls = called(log, "comparison.sh", *arguments.split())
            assert job.returncode == 0, job.stderr
    assert len(calls) == len(set(calls)) == 21 + 6
    trained = [call for call in calls if "--head fcos --data photos --width 0.5" in call]
    assert [Path(call.split()[2]).name for call in trained] == ["teacher", "conventional", "low-alone"]
    for script, (typed, resumed) in map(parse, calls):
        settings.settle(typed, script.OWN, 100, torch.device("cpu"))
        folder, name = Path(typed["out"]).parts[-2:]
        assert resumed and typed["seed"] == 0 and folder in ("shapes-fcos-0", "photos-fcos-0")
        iters = {"conventional": 14, "low-alone": 14, "teacher-2400": 2400, "teacher-4800": 4800, "student-long": 4800}
        assert typed.get("iters") == iters.get(name)


def test_the_script_for_a_gpu_makes_calls_that_the_scripts_understand(called, tmp_path):
    """The last call of all fails."""
    answers = 'case "$*" in *get_device*) echo 2;; *coco*) exit 3;; esac'
    job, calls = called(answers, "cuda.sh", "/data/coco")
    report = (tmp_path / "cuda-report.txt").read_text()
    assert job.returncode == 1 and "\n1 failed, " in report and report in job.stdout
    paths, flags = zip(*((Path(path), flags) for path, *flags in map(shlex.split, calls) if path.startswith("/")))
    assert [path.name for path in paths] == ["benchmark.py", "train.py", "distill.py", "evaluate.py", "train.py"]
    assert all(path.is_relative_to(ROOT) and path.exists() for path in paths)
    for path, own in list(zip(paths, flags))[1:]:
        parse(shlex.join([path.name, *own]))
    assert flags[-1][flags[-1].index("--accumulate") + 1] == "2" and "runs/cuda/teacher/last.pt" in flags[2]
