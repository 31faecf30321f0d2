"""Freed memory stays with the process."""

import subprocess
import sys

SCRIPT = """
import resource, sys, torch
from hf_msn.trainers.freed_memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else True
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MiB
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept, number = map(int, done.stdout.split())
    assert kept
    return number


def test_memory_that_was_freed_is_not_asked_for_again():
    pages = 5 * 2**26 // 4096
    assert faults("keep") < pages / 100
    assert faults("default") > faults("keep") + 50
