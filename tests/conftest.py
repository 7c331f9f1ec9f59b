"""One thread for tests and for every process they start: bit-identical runs need the same number everywhere."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))  # msad and the scripts, for a bare `pytest` too
