"""Random edits of what a checkpoint knows of its run: `--resume` goes on, or stops with one clear line."""

import copy
import random
import shutil
from collections import Counter

import pytest
import torch
from scripts import call, runs

STRANGE = (None, "x", "", -1, 0, 0.5, float("nan"), 1e300, 10**30, True, [], {}, (1,), {"id": 1}, torch.zeros(2))


def edited(content, rng):
    """A copy in which one value of the run's part is another, or is gone; and where."""
    content = copy.deepcopy(content)
    at, key, path = content, "training", ["training"]
    while isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.9:
        at = at[key]
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        path.append(key)
    if rng.random() < 0.25:
        del at[key]
    else:
        at[key] = copy.deepcopy(rng.choice(STRANGE))
        path.append(at[key])
    return content, path


@pytest.mark.parametrize("name", ["trained", "distilled"])
def test_resuming_from_a_random_edit_goes_on_or_says_why_not(uninterrupted, tmp_path, name):
    script, _ = runs(uninterrupted)[name]
    path = shutil.copytree(uninterrupted / name, tmp_path / "out") / "last.pt"
    rng, outcomes = random.Random(name), Counter()
    content = torch.load(path, weights_only=True)
    content["training"]["done"] = 19
    for _ in range(50):
        changed, where = edited(content, rng)
        torch.save(changed, path)
        code, _, complained = call(script, "--resume", "--out", path.parent, "--data", uninterrupted / "data")
        assert code == 0 or (code == 2 and complained.count("\n") == 1 and complained.startswith("error: ")), where
        outcomes[code] += 1
    assert min(outcomes[0], outcomes[2]) > 5, outcomes
