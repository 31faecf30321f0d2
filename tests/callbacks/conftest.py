import sys
from pathlib import Path

# sync_runs.py, and the short runs of the trainers.
sys.path[:0] = [str(Path(__file__).parents[1] / "trainers" / folder) for folder in ("callbacks", ".")]
