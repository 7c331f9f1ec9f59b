"""AP over minutes of several runs, in one picture: python .github/figures/curves.py NAME=LOG=MINUTES ...

LOG is a run's log.jsonl with evaluations on the way (--eval-every), MINUTES what its iterations take on an idle machine,
measured apart. A teacher's curve is that of its fused branch. Writes curves.png.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from msad.engine.drawing import chart, color


def read(log, minutes):
    """[(minute, AP)] of the first branch at each evaluation in the text of a log, from 0 at the start on."""
    entries = [entry for entry in map(json.loads, log.splitlines()) if "branch" in entry]
    entries = [entry for entry in entries if entry["branch"] == entries[0]["branch"]]
    return [(0, 0)] + [(minutes * e["done"] / entries[-1]["done"], 100 * e["AP"]) for e in entries]


def main():
    runs = [argument.rsplit("=", 2) for argument in sys.argv[1:]]
    lines = {name: read(Path(log).read_text(), float(minutes)) for name, log, minutes in runs}
    hues = {name: color(number) for number, name in enumerate(lines)}
    right = max(line[-1][0] for line in lines.values())
    picture = chart(lines, hues, "AP over minutes", right)
    picture.save(ROOT / ".github" / "figures" / "curves.png", optimize=True)


if __name__ == "__main__":
    main()
