"""Freed memory stays in the process."""

import subprocess
import sys

import pytest
from short_runs import make_trainer

from hf_msn.trainers import pretraining_trainer

# Loads the file alone, which imports nothing else of the package.
SCRIPT = """
import importlib.util, resource, sys, torch
spec = importlib.util.spec_from_file_location("freed_memory", sys.argv[1])
freed_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(freed_memory)
kept = sys.argv[2] == "keep" and freed_memory.keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MiB
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(mode: str) -> tuple[int, int]:
    path = pretraining_trainer.__file__.replace("pretraining_trainer", "freed_memory")
    done = subprocess.run([sys.executable, "-c", SCRIPT, path, mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.mark.slow
def test_freed_memory_is_used_again_without_page_faults():
    kept, faults = count_page_faults("keep")
    assert kept and faults < 5 * 2**26 // 4096 / 100
    assert count_page_faults("default")[1] > faults + 50


def test_memory_is_kept_unless_the_option_is_off(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pretraining_trainer, "keep_freed_memory", lambda: calls.append(1))
    for kept in (False, True):
        settings = {"keep_freed_memory": kept, "max_steps": 1, "save_strategy": "no"}
        make_trainer(tmp_path, **settings).train()
        assert len(calls) == kept
