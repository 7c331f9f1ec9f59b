"""The comparison's tables and its picture, of .github/numbers.jsonl, which collect.py makes: results.py

Prints AP as mean ± standard deviation over the seeds, and the differences between rows of the same seeds as mean ±
standard error over the seeds, and ± the standard error that comes of the pictures (the deviation of the mean difference
over resampled validation sets); writes cost.png, AP of FCOS on shapes against the whole cost of one image.
"""

import json
import statistics
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
# Row: its name in numbers.jsonl, the branch, and what it is called.
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
    ("teacher", "fused", "student-alone", "low"),
    ("student-narrow", "low", "student-pkd", "low"),
    ("student-slim", "low", "student-pkd", "low"),
    ("student-cold", "low", "student-cold-alone", "low"),
    ("student-half", "low", "student-half-alone", "low"),
)
INK, GREY = (40, 40, 40), (222, 222, 222)
ALONE, TEACHER, STUDENT = (110, 110, 110), (44, 95, 160), (206, 110, 40)
NAMES = {(row, branch): name.replace("*", "") for row, branch, name in ROWS}
COLORS = {"conventional": ALONE, "low-alone": ALONE, "teacher": TEACHER, "teacher-wide": TEACHER}


def read():
    """{(set, head): {(row, branch): {seed: entry of numbers.jsonl}}}."""
    found = {}
    for entry in map(json.loads, (ROOT / ".github" / "numbers.jsonl").read_text().splitlines()):
        rows = found.setdefault((entry["set"], entry["head"]), {})
        rows.setdefault((entry["row"], entry["branch"]), {})[entry["seed"]] = entry
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != "shapes", item[0])))


def mean_and(spread, values, form):
    """ "86.2 ± 0.6", with the number of seeds where they are fewer than three; "-" where there is nothing to find."""
    if min(values) < -99:
        return "-"
    text = format(statistics.mean(values), form)
    if len(values) > 1:
        text += f" ± {spread(values):.1f}"
    return text if len(values) > 2 else f"{text} ({len(values)} seed{'s' if values[1:] else ''})"


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5


def results(rows):
    """A table of every row's AP."""
    print("| AP | all | AP50 | small | medium | large |\n" + "|---" * 6 + "|")
    for row, branch, name in ROWS:
        entries = rows.get((row, branch), {}).values()
        if entries:
            columns = [[100 * e[key] for e in entries] for key in ("AP", "AP50", "APs", "APm", "APl")]
            print(f"| {name} | {' | '.join(mean_and(statistics.stdev, column, '.1f') for column in columns)} |")


def differences(rows):
    """A table of the differences between two rows of the same seeds."""
    print("\n| difference in AP | mean ± standard error over seeds | of the pictures |\n|---|---|---|")
    for *one, other, against in PAIRS:
        first, second = rows.get(tuple(one), {}), rows.get((other, against), {})
        both = sorted(first.keys() & second.keys())
        if both:
            by_seed = [100 * (first[s]["AP"] - second[s]["AP"]) for s in both]
            resampled = [np.subtract(first[s]["resampled"], second[s]["resampled"]) for s in both]
            pictures = 100 * np.std(np.mean(resampled, axis=0))
            names = f"{NAMES[tuple(one)]} - {NAMES[other, against]}"
            print(f"| {names} | {mean_and(standard_error, by_seed, '+.1f')} | ± {pictures:.1f} |")


def points(rows):
    """[(name, row, GMACs of one image, mean AP)] of every row."""
    for row, branch, _ in ROWS:
        entries = list(rows.get((row, branch), {}).values())
        if entries:
            yield NAMES[row, branch], row, entries[0]["gmacs"], statistics.mean(100 * e["AP"] for e in entries)


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
    for x in np.arange(0, right, 0.1).tolist():
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
    found = read()
    for (pictures, head), rows in found.items():
        print(f"\n{pictures}, {head}\n")
        results(rows)
        differences(rows)
    draw(list(points(found["shapes", "fcos"])), ROOT / ".github" / "figures" / "cost.png")


if __name__ == "__main__":
    main()
