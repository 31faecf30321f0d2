"""Runs a script as somebody would who does not have hf_msn: another folder, no PYTHONPATH, the import blocked."""

import subprocess
import sys
from pathlib import Path

PREAMBLE = """
import sys

sys.modules["hf_msn"] = None
sys.path[:] = [path for path in sys.path if path not in ("", ".")]
"""


def run_without_hf_msn(script: str, *arguments, cwd: Path) -> str:
    """What `script` prints."""
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
