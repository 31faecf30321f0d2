"""Plots of topologies, and their consensus distances."""

import math
import sys

import pytest
import torch
from PIL import Image
from topologies import MAKERS, Star

from hf_msn.distributed.topology import CompleteTopology, ExponentialTopology, RingTopology, plot
from hf_msn.distributed.topology_plot import consensus_distances


@pytest.mark.slow
def test_plot_writes_a_picture_of_one_or_several_topologies(tmp_path):
    single, several = tmp_path / "new" / "one.png", tmp_path / "several.png"
    plot(ExponentialTopology(6, 2), single)
    plot([MAKERS["bipartite"](5), RingTopology(5).without([2]), RingTopology(1)], several, steps=3)
    sizes = [Image.open(path).size for path in (single, several)]
    assert sizes[1][0] > 1.5 * sizes[0][0], "several topologies stand beside one another"
    assert all(len(Image.open(path).convert("RGB").getcolors(2**24)) > 50 for path in (single, several))


def test_consensus_distances_follow_the_mixing_matrices_with_push_sum():
    exact = consensus_distances(ExponentialTopology(8), 4)
    assert len(exact) == 5 and min(exact[:3]) > 0.1 and max(exact[3:]) < 1e-14
    assert consensus_distances(Star(5), 200)[-1] < 1e-12
    assert consensus_distances(CompleteTopology(5).without([0]), 1)[-1] < 1e-14
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    total = 0.0
    for row in RingTopology(6).mixing_matrix(0) @ x:
        total += float(((row - x.mean(0)) ** 2).sum()) / 64 / 6
    assert consensus_distances(RingTopology(6), 1, seed=4)[1] == pytest.approx(math.sqrt(total), abs=1e-14)


def test_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf_msn\[demo\]"):
        plot(RingTopology(3), tmp_path / "a.png")


def test_wrong_arguments_are_named(tmp_path):
    for name in ("steps", "consensus_steps"):
        with pytest.raises(ValueError, match=f"`{name}`.*0"):
            plot(RingTopology(4), tmp_path / "a.png", **{name: 0})
    for nothing in ([], [3], "ring"):
        with pytest.raises(ValueError, match="`topology`"):
            plot(nothing, tmp_path / "a.png")
