import sys
from pathlib import Path

# sync_runs.py of this folder, and the short runs of the trainers.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "trainers")]
