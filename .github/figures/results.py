"""The comparison's tables and its picture: python .github/figures/results.py RUNS

RUNS holds what .github/comparison.sh made, a folder for each head and seed. Prints AP as mean ± standard deviation over
the seeds, and the differences between rows of the same seed as mean ± standard error; writes cost.png, AP of FCOS on
shapes, if it is there, against the whole cost of one image.
"""

import json
import statistics
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from msad.engine import checkpoint, cost
from msad.engine.drawing import ticks

# Row: the run's folder, the branch, and what the row is called.
ROWS = (
    ("conventional", "high", "conventional multi-scale @ high"),
    ("conventional", "low", "conventional multi-scale @ low"),
    ("low-alone", "low", "low resolution alone, aligned (P2-P6)"),
    ("teacher", "fused", "aligned teacher, fused (half the iterations)"),
    ("teacher", "high", "aligned teacher @ high (half)"),
    ("teacher", "low", "aligned teacher @ low (half)"),
    ("student-alone", "low", "student without distillation"),
    ("student", "low", "**student, the paper's L1**"),
    ("student-pkd", "low", "**student, PKD's correlation**"),
    ("student-narrow", "low", "slim student, PKD: half the head's channels"),
    ("student-slim", "low", "slim student, PKD: half the head's convolutions"),
    ("student-cold-alone", "low", "cold start, without distillation (half)"),
    ("student-cold", "low", "cold start, L1"),
    ("teacher-wide", "fused", "aligned teacher of twice the width, fused (half)"),
    ("student-half-alone", "low", "student of half its teacher's width, without distillation"),
    ("student-half", "low", "student of half its teacher's width, PKD"),
)
PAIRS = (
    ("student", "low", "conventional", "low"),
    ("student-pkd", "low", "conventional", "low"),
    ("student", "low", "conventional", "high"),
    ("student-pkd", "low", "conventional", "high"),
    ("student", "low", "student-alone", "low"),
    ("student-pkd", "low", "student-alone", "low"),
    ("student", "low", "low-alone", "low"),
    ("student-pkd", "low", "low-alone", "low"),
    ("student-narrow", "low", "student-pkd", "low"),
    ("student-slim", "low", "student-pkd", "low"),
    ("student-cold", "low", "student-cold-alone", "low"),
    ("student-half", "low", "student-half-alone", "low"),
)
INK, GREY = (40, 40, 40), (222, 222, 222)
ALONE, TEACHER, STUDENT = (110, 110, 110), (44, 95, 160), (206, 110, 40)
COLORS = {"conventional": ALONE, "low-alone": ALONE, "teacher": TEACHER, "teacher-wide": TEACHER}


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


def mean_and(spread, values, form):
    """ "86.2 ± 0.6", with the number of seeds where they are fewer than three; "" without values, "-" for nothing."""
    if not values or min(values) == -100:
        return "-" if values else ""
    text = format(statistics.mean(values), form)
    if len(values) > 1:
        text += f" ± {spread(values):.1f}"
    return text if len(values) > 2 else f"{text} ({len(values)} seed{'s' if values[1:] else ''})"


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5


def tables(found):
    """AP, and AP of small objects, of every row for every head; then the differences between rows of the same seed."""
    heads = sorted({head for head, _, _ in found}, key=lambda head: ("fcos", "retinanet", head).index(head))
    values = lambda head, folder, branch, key: [100 * e[key] for e in found.get((head, folder, branch), {}).values()]
    known = lambda head, key: max(values(head, "teacher", "high", key), default=-1) >= 0
    titles = {"AP": "", "AP50": "AP50", "APs": "small"}
    columns = [(head, key) for head in heads for key in titles if known(head, key)]
    columns = [(head, key) for head, key in columns if key != "AP50" or head not in ("fcos", "retinanet")]
    print("| AP | " + " | ".join(titles[key] or head for head, key in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for folder, branch, name in ROWS:
        cells = [mean_and(statistics.stdev, values(head, folder, branch, key), ".1f") for head, key in columns]
        if any(cells):
            print(f"| {name} | {' | '.join(cells)} |")
    print("\n| difference in AP, the same seeds | " + " | ".join(heads) + " |\n" + "|---" * (1 + len(heads)) + "|")
    names = {(folder, branch): name.replace("*", "") for folder, branch, name in ROWS}
    for one, branch, other, against in PAIRS:
        cells = []
        for head in heads:
            first, second = found.get((head, one, branch), {}), found.get((head, other, against), {})
            both = sorted(first.keys() & second.keys())
            cells.append(mean_and(standard_error, [100 * (first[s]["AP"] - second[s]["AP"]) for s in both], "+.1f"))
        if any(cells):
            print(f"| {names[one, branch]} - {names[other, against]} | {' | '.join(cells)} |")


def points(runs, found, head):
    """[(name, folder, GMACs of one image, mean AP)] of every row."""
    result = []
    for folder, branch, name in ROWS:
        seeds = found.get((head, folder, branch), {})
        for seed in list(seeds)[:1]:
            model = checkpoint.load(Path(runs) / f"{head}-{seed}" / folder / "last.pt")
            side = model.config.short_side
            total = cost.count_cost(model, branch, side, side)["gmacs"]["total"]
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
    right, bottom, top = 1.1 * max(costs), int(min(scores)) - 1, int(max(scores)) + 2
    share = lambda y: (y - bottom) / (top - bottom)
    at = lambda x, y: (fine * (60 + (width - 90) * x / right), fine * (height - 55 - (height - 90) * share(y)))
    for y in range(bottom, top + 1, 2):
        pen.line([at(0, y), at(right, y)], GREY, fine)
        pen.text((at(0, y)[0] - 8 * fine, at(0, y)[1]), str(y), INK, font, anchor="rm")
    for x in ticks(right):
        pen.text((at(x, bottom)[0], at(x, bottom)[1] + 8 * fine), f"{x:g}", INK, font, anchor="mt")
    pen.text((fine * width / 2, fine * (height - 6)), "GMACs of one image, all of the network", INK, font, anchor="mb")
    pen.text((fine * 60, fine * 18), "AP", INK, font, anchor="mm")
    dots = [at(x, y) for _, _, x, y in found_points]
    taken = [(a - 6 * fine, a + 6 * fine, b) for a, b in dots]  # of names and dots: from, to, at what height
    for (a, b), (name, folder, _, y) in sorted(zip(dots, found_points), key=lambda pair: (-pair[0][0], pair[0][1])):
        fill, words = COLORS.get(folder, STUDENT), f"{name} {y:.1f}"
        start = a + 16 * fine if a < width * fine / 2 else a - 16 * fine - font.getlength(words)
        end, row = start + font.getlength(words), b
        while any(abs(row - other) < 17 * fine and start < to and end > since for since, to, other in taken):
            row += fine
        taken.append((start, end, row))
        pen.line([a, b, start - 3 * fine if start > a else end + 3 * fine, row], fill, fine)
        pen.text((start, row), words, fill, font, anchor="lm")
        pen.ellipse([a - 5 * fine, b - 5 * fine, a + 5 * fine, b + 5 * fine], fill)
    canvas.resize((width, height), Image.Resampling.LANCZOS).save(path, optimize=True)


def main():
    found = read(sys.argv[1])
    tables(found)
    fcos = points(sys.argv[1], found, "fcos")
    if fcos:
        draw(fcos, ROOT / ".github" / "figures" / "cost.png")


if __name__ == "__main__":
    main()
