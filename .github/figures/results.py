"""The comparison's table and its picture: python .github/figures/results.py RUNS

RUNS holds what .github/comparison.sh made, a folder HEAD-SEED each. Prints mean and standard deviation of AP over the
seeds, and of the differences between rows of the same seed; writes cost.png, AP against the whole cost of one image.
"""

import json
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from msad import checkpoint, cost
from msad.curve import ticks

# Row: the run's folder, the branch, and what the row is called.
ROWS = (
    ("conventional", "high", "conventional multi-scale @ high"),
    ("conventional", "low", "conventional multi-scale @ low"),
    ("teacher", "fused", "aligned teacher, fused"),
    ("teacher", "high", "aligned teacher @ high"),
    ("teacher", "low", "aligned teacher @ low"),
    ("low-alone", "low", "low resolution alone"),
    ("student-alone", "low", "student, no distillation"),
    ("student", "low", "**student, the paper's L1**"),
    ("student-pkd", "low", "**student, PKD's correlation**"),
    ("student-narrow", "low", "slim student, PKD: half the head's channels"),
    ("student-slim", "low", "slim student, PKD: half the head's convolutions"),
    ("student-cold-alone", "low", "cold start, no distillation"),
    ("student-cold", "low", "cold start, L1"),
    ("teacher-wide", "fused", "aligned teacher of twice the width, fused"),
    ("student-half-alone", "low", "its student of half that width, no distillation"),
    ("student-half", "low", "its student of half that width, PKD"),
)
PAIRS = (
    ("student", "conventional", "low"),
    ("student", "conventional", "high"),
    ("student", "student-alone", "low"),
    ("student-pkd", "conventional", "low"),
    ("student-pkd", "conventional", "high"),
    ("student-pkd", "student-alone", "low"),
    ("student-cold", "student-cold-alone", "low"),
    ("student-narrow", "student-pkd", "low"),
    ("student-slim", "student-pkd", "low"),
    ("student-half", "student-half-alone", "low"),
    ("student-alone", "low-alone", "low"),
    ("teacher", "conventional", "low"),
)
INK, GREY = (40, 40, 40), (222, 222, 222)
COLORS = {"conventional": (110, 110, 110), "teacher": (44, 95, 160), "low-alone": (110, 110, 110)}
STUDENT = (206, 110, 40)


def read(runs):
    """{(head, folder, branch): {seed: metrics after the last iteration}}."""
    found = {}
    for log in sorted(Path(runs).glob("*/*/log.jsonl")):
        head, seed = log.parts[-3].rsplit("-", 1)
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        results = [e for e in entries if "branch" in e]
        for entry in results:
            if entry["done"] == results[-1]["done"] and (log.parent / "finished").exists():
                found.setdefault((head, log.parts[-2], entry["branch"]), {})[int(seed)] = entry
    return found


def spread(values):
    """"86.2 ± 0.6", or "-" where there is nothing to find."""
    if min(values) < 0:
        return "-"
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(found, head):
    """One line for each row: AP, AP of small, medium and large objects, and the number of seeds."""
    print(f"\n| {head} | AP | small | medium | large | seeds |\n|---|---|---|---|---|---|")
    for folder, branch, name in ROWS:
        seeds = found.get((head, folder, branch))
        if seeds:
            columns = [spread([100 * e[key] for e in seeds.values()]) for key in ("AP", "APs", "APm", "APl")]
            print(f"| {name} | {' | '.join(columns)} | {len(seeds)} |")
    print(f"\n| {head}, AP of the same seeds | difference | standard error | seeds |\n|---|---|---|---|")
    for one, other, branch in PAIRS:
        first, second = found.get((head, one, "low"), {}), found.get((head, other, branch), {})
        both = sorted(first.keys() & second.keys())
        if both:
            differences = [100 * (first[s]["AP"] - second[s]["AP"]) for s in both]
            error = f"{statistics.stdev(differences) / len(both) ** 0.5:.2f}" if len(both) > 1 else ""
            mean = statistics.mean(differences)
            print(f"| {one} - {other} @ {branch} | {mean:+.1f} | {error} | {len(both)} |")


def points(runs, found, head):
    """[(name, folder, GMACs of one image, mean AP)] of every row."""
    result = []
    for folder, branch, name in ROWS:
        seeds = found.get((head, folder, branch), {})
        for seed in list(seeds)[:1]:
            model = checkpoint.load(Path(runs) / f"{head}-{seed}" / folder / "last.pt")
            side = model.config.short_side
            total = cost.gmacs(model, branch, side, side)["total"]
            ap = statistics.mean(100 * e["AP"] for e in seeds.values())
            result.append((name.replace("*", ""), folder, total, ap))
    return result


def draw(found_points, path):
    """AP (up) against GMACs (right) with a name at every point."""
    fine, (width, height) = 3, (1000, 460)
    canvas = Image.new("RGB", (width * fine, height * fine), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(14 * fine)
    costs, scores = [p[2] for p in found_points], [p[3] for p in found_points]
    right, bottom, top = 1.4 * max(costs), int(min(scores)) - 1, int(max(scores)) + 2
    share = lambda y: (y - bottom) / (top - bottom)
    at = lambda x, y: (fine * (60 + (width - 90) * x / right), fine * (height - 55 - (height - 90) * share(y)))
    for y in range(bottom, top + 1, 2):
        pen.line([at(0, y), at(right, y)], GREY, fine)
        pen.text((at(0, y)[0] - 8 * fine, at(0, y)[1]), str(y), INK, font, anchor="rm")
    for x in ticks(right):
        pen.text((at(x, bottom)[0], at(x, bottom)[1] + 8 * fine), f"{x:g}", INK, font, anchor="mt")
    pen.text((fine * width / 2, fine * (height - 6)), "GMACs of one image, all of the network", INK, font, anchor="mb")
    pen.text((fine * 60, fine * 18), "AP", INK, font, anchor="mm")
    taken = []
    for name, folder, x, y in sorted(found_points, key=lambda p: -p[3]):
        a, b = at(x, y)
        fill = COLORS.get(folder, STUDENT)
        pen.ellipse([a - 5 * fine, b - 5 * fine, a + 5 * fine, b + 5 * fine], fill)
        words, row = f"{name} {y:.1f}", b
        start, end = a + 10 * fine, a + 14 * fine + font.getlength(words)
        while any(abs(row - other) < 17 * fine and start < to and end > since for since, to, other in taken):
            row += 2 * fine
        taken.append((a, end, row))
        pen.text((start, row), words, fill, font, anchor="lm")
    canvas.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)


def main():
    found = read(sys.argv[1])
    for head in sorted({head for head, _, _ in found}):
        table(found, head)
    draw(points(sys.argv[1], found, "fcos"), ROOT / ".github" / "figures" / "cost.png")


if __name__ == "__main__":
    main()
