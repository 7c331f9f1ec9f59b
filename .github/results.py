"""The comparison's tables, of the lines that collect.py printed: python .github/results.py < .github/numbers.jsonl

Prints AP as mean ± standard deviation over the seeds, and the differences between rows of the same seeds as mean ±
standard error over the seeds, and ± the standard error that comes of the pictures (the deviation of the mean difference
over resampled validation sets). GMACs are those of one image of the padded size that most have, of the whole network.
"""

import json
import statistics
import sys

import numpy as np

# Row: its name in numbers.jsonl, the branch, and what it is called.
ROWS = (
    ("conventional", "high", "conventional multi-scale @ high"),
    ("conventional", "low", "conventional multi-scale @ low"),
    ("conventional-half", "high", "conventional multi-scale @ high, half the iterations"),
    ("conventional-half", "low", "conventional multi-scale @ low, half the iterations"),
    ("low-alone", "low", "low resolution alone, aligned (P2-P6)"),
    ("teacher", "fused", "aligned teacher, fused (half the iterations)"),
    ("teacher", "high", "aligned teacher @ high (half)"),
    ("teacher", "low", "aligned teacher @ low (half)"),
    ("student-alone", "low", "student without distillation"),
    ("student", "low", "**student, the paper's L1**"),
    ("student-pkd", "low", "**student, PKD's correlation**"),
    ("teacher-2400", "fused", "aligned teacher of 2 400 iterations, fused"),
    ("student-alone-2400", "low", "student without distillation, of a teacher of 2 400 iterations"),
    ("student-2400", "low", "student, the paper's L1, of a teacher of 2 400 iterations"),
    ("teacher-4800", "fused", "aligned teacher of 4 800 iterations, fused"),
    ("student-alone-4800", "low", "student without distillation, of a teacher of 4 800 iterations"),
    ("student-4800", "low", "student, the paper's L1, of a teacher of 4 800 iterations"),
    ("student-long", "low", "student, the paper's L1, 4 800 iterations"),
    ("student-narrow", "low", "slim student, PKD: half the head's channels"),
    ("student-slim", "low", "slim student, PKD: half the head's convolutions"),
    ("student-cold-alone", "low", "cold start, without distillation (half)"),
    ("student-cold", "low", "cold start, L1 (half)"),
    ("teacher-wide", "fused", "aligned teacher of twice the width, fused (half)"),
    ("student-half-alone", "low", "student of half its teacher's width, without distillation"),
    ("student-half", "low", "student of half its teacher's width, PKD"),
)
PAIRS = (
    ("student", "low", "conventional", "low"),
    ("student-pkd", "low", "conventional", "low"),
    ("student", "low", "conventional-half", "low"),
    ("student", "low", "conventional", "high"),
    ("student-pkd", "low", "conventional", "high"),
    ("low-alone", "low", "conventional", "low"),
    ("student", "low", "student-alone", "low"),
    ("student-pkd", "low", "student-alone", "low"),
    ("student", "low", "low-alone", "low"),
    ("student-pkd", "low", "low-alone", "low"),
    ("teacher", "fused", "student-alone", "low"),
    ("student-2400", "low", "student-alone-2400", "low"),
    ("student-4800", "low", "student-alone-4800", "low"),
    ("student-4800", "low", "student-long", "low"),
    ("teacher-2400", "fused", "student-alone-2400", "low"),
    ("teacher-4800", "fused", "student-alone-4800", "low"),
    ("student-narrow", "low", "student-pkd", "low"),
    ("student-slim", "low", "student-pkd", "low"),
    ("student-cold", "low", "student-cold-alone", "low"),
    ("student-half", "low", "student-half-alone", "low"),
)
NAMES = {(row, branch): name.replace("*", "") for row, branch, name in ROWS}


def read():
    """{(set, head): {(row, branch): {seed: entry of numbers.jsonl}}}."""
    found = {}
    for entry in map(json.loads, sys.stdin):
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
    print("| AP | all | AP50 | small | medium | large | GMACs |\n" + "|---" * 7 + "|")
    for row, branch, name in ROWS:
        entries = rows.get((row, branch), {}).values()
        if entries:
            columns = [[100 * e[key] for e in entries] for key in ("AP", "AP50", "APs", "APm", "APl")]
            cells = [mean_and(statistics.stdev, column, ".1f") for column in columns]
            print(f"| {name} | {' | '.join(cells)} | {next(iter(entries))['gmacs']:.2f} |")


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


def check_lengths(rows):
    """Raise AssertionError unless all teachers trained equally long and students as long as they, "long" ones four
    times, and what trains in one go as long as both together."""
    lengths = {entry["iterations"] for entry in rows.get(("teacher", "fused"), {}).values()}
    assert len(lengths) == 1, f"not all teachers of one length: {sorted(lengths)}"
    for (row, _), entries in rows.items():
        wanted = {"conventional": 2, "low-alone": 2, "student-long": 4}.get(row, 1) * min(lengths)
        for seed, entry in entries.items() if not row.startswith("teacher") else ():
            about = f"{entry['set']}-{entry['head']}-{seed}/{row}"
            assert entry["iterations"] == wanted, f"{about}: not {wanted}"


def main():
    for (pictures, head), rows in read().items():
        check_lengths(rows)
        print(f"\n{pictures}, {head}\n")
        results(rows)
        differences(rows)


if __name__ == "__main__":
    main()
