"""scripts/benchmarks/memory.py"""

import contextlib
import ctypes
import io
import json
import subprocess
import sys
from pathlib import Path

import memory
import pytest
import torch
from torch import nn

TINY = (
    "--hidden_size 64 --num_hidden_layers 1 --image_size 16 --patch_size 4 --projection_hidden_dim 16 "
    "--projection_dim 8 --chunk_size 8"
).split()


def test_what_a_forward_pass_keeps_is_counted_once():
    layers = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2), nn.Tanh())
    x = torch.randn(5, 4, requires_grad=True)
    # The inputs of GELU and of the second layer, and the output of tanh; not the weights, nor the input itself.
    assert memory.saved_bytes(layers, layers, x) == 4 * 5 * (6 + 6 + 2)


def test_bytes_of_paws_by_the_batch():
    args = memory.MemoryArguments(
        method="paws", timm_model="resnet18", supports=20, classes=5, small_crops=3, image_size=32, small_size=16,
        chunk_size=8,
    )  # fmt: skip
    small, large = (memory.count_bytes(args, size) for size in (16, 64))
    parameters = sum(p.numel() for p in args.build_model().parameters())
    assert large["weights"] == small["weights"] == 3 * 4 * parameters
    pixels = 64 * (2 * 32**2 + 3 * 16**2) + 20 * 32**2
    assert large["views"] == 4 * 3 * pixels + 8 * 20
    assert large["loss"] == 4 * 6 * (64 * 5) * 25
    assert large["chunk"] == small["chunk"] > 0  # flat
    assert large["total"] == sum(part for name, part in large.items() if name != "total")
    whole = memory.count_bytes(memory.MemoryArguments(**{**vars(args), "chunk_size": 16}), 16)
    assert whole["chunk"] == pytest.approx(2 * small["chunk"], rel=0.01)


def in_this_process(command, **options) -> subprocess.CompletedProcess:
    """Measure without importing everything again, but with a peak of its own and no freed memory to use again."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[1:])
        memory.main()
    return subprocess.CompletedProcess(command, 0, stdout=printed.getvalue())


def test_table_json_and_plot_have_both_steps(run, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", in_this_process)
    output = tmp_path / "memory.json"
    printed = run(memory, *TINY, "--batch_sizes", 256, "--output", output)
    (entry,) = json.loads(output.read_text())["results"]
    assert output.with_suffix(".png").stat().st_size > 1000
    for name in ("plain", "cached"):
        assert entry[name]["peak_mib"] > entry[name]["base_mib"] > 100
        assert f"{entry[name]['peak_mib']:.0f}" in printed
    assert f"{entry['cached']['seconds'] / entry['plain']['seconds']:.2f}" in printed
