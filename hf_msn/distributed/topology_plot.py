"""Plots of topologies: the graph of a period, and the consensus distance against the step."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checks import check_integer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VALUES_PER_RANK = 64


def plot(
    topology: Any,
    path: str | Path,
    *,
    steps: int | None = None,
    consensus_steps: int = 24,
    seed: int = 0,
) -> None:
    """Write a PNG: the graph of each topology with edges coloured by step, and below the consensus distance of all.

    An edge with a head is a message in one direction, an edge without is an exchange. Consensus starts from standard
    normal values, see [`consensus_distances`].

    Args:
        topology ([`Topology`] or a sequence of them): The topologies to compare, of any numbers of ranks.
        path (`str` or `Path`): The file to write. Missing folders are made.
        steps (`int`, *optional*): Number of steps in the graph; by default the period, or 4 without one.
        consensus_steps (`int`, *optional*, defaults to 24): Number of steps in the curve.
        seed (`int`, *optional*, defaults to 0): Seed of the random values.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no topology, or a number of steps is not an integer >= 1.
    """
    topologies = list(topology) if isinstance(topology, Sequence) else [topology]
    if not topologies or not all(hasattr(one, "mixing_matrix") for one in topologies):
        raise ValueError(f"`topology` must be a Topology or a sequence of at least one, but is {topology!r}.")
    if steps is not None:
        steps = check_integer("steps", steps, meaning="is the number of steps in the graph")
    consensus_steps = check_integer("consensus_steps", consensus_steps, meaning="is the length of the curve")
    try:
        from matplotlib.figure import Figure  # not pyplot: the caller's figures and backend stay as they are
    except ImportError as error:
        raise ImportError(
            "`plot` draws with matplotlib, which is not installed. Install it with `pip install 'hf_msn[demo]'`."
        ) from error

    width = max(7.0, 4.0 * len(topologies))
    figure = Figure(figsize=(width, 8.0), layout="constrained")
    grid = figure.add_gridspec(2, len(topologies), height_ratios=(1.15, 1.0))
    for column, one in enumerate(topologies):
        _draw_graph(figure.add_subplot(grid[0, column]), one, steps or one.period or 4)
    _draw_consensus(figure.add_subplot(grid[1, :]), topologies, consensus_steps, seed)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130)


def consensus_distances(topology: Any, steps: int, seed: int = 0) -> list[float]:
    """Return the consensus distance before step 0 and after each of `steps` steps: `steps` + 1 numbers.

        Xi(k) = sqrt(mean_i ||z_i(k) - zbar(k)||^2 / d),    z_i = x_i / w_i

    x and the push-sum weights w (all 1 at first) are mixed by the same matrices; x(0) of shape (n, d = 64) is standard
    normal, float64. The mean is over the ranks that are alive.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(topology.world_size, _VALUES_PER_RANK, generator=generator, dtype=torch.float64)
    weights = torch.ones(topology.world_size, 1, dtype=torch.float64)
    distances = []
    for step in range(steps + 1):
        estimates = (values / weights)[topology.alive]
        distances.append((estimates - estimates.mean(0)).square().mean().sqrt().item())
        if step < steps:
            matrix = topology.mixing_matrix(step)
            values, weights = matrix @ values, matrix @ weights
    return distances


def _draw_graph(axes: "Axes", topology: Any, steps: int) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import FancyArrowPatch

    n = topology.world_size
    places = [(math.sin(2 * math.pi * rank / n), math.cos(2 * math.pi * rank / n)) for rank in range(n)]
    dot = min(15.0, 110.0 / n)
    # The bright end of the map cannot be seen on white.
    colors = [colormaps["viridis"](0.85 * step / max(1, steps - 1)) for step in range(steps)]
    for step in range(steps):
        edges = {(rank, peer) for rank in range(n) for peer in topology.out_peers(rank, step)}
        for rank, peer in sorted(edges):
            exchange = (peer, rank) in edges
            if exchange and peer < rank:
                continue  # drawn from the other end
            axes.add_patch(
                FancyArrowPatch(
                    places[rank],
                    places[peer],
                    arrowstyle="-" if exchange else "-|>",
                    mutation_scale=10,
                    shrinkA=dot / 2,
                    shrinkB=dot / 2,
                    color=colors[step],
                    linewidth=1.3,
                    # Bent more at later steps, or a repeated edge would hide the one before.
                    connectionstyle=f"arc3,rad={0.08 * min(step, 4)}",
                )
            )
    alive = topology.alive
    for rank, (x, y) in enumerate(places):
        axes.plot(x, y, "o", color="0.2" if rank in alive else "0.85", markersize=dot, zorder=3)
        if dot >= 8:
            axes.text(x, y, str(rank), color="white", ha="center", va="center", fontsize=0.55 * dot, zorder=4)
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    axes.set_title(_name(topology), fontsize=9, wrap=True)
    axes.axis("off")
    if steps > 1:
        mappable = ScalarMappable(BoundaryNorm(range(steps + 1), steps), ListedColormap(colors))
        bar = axes.figure.colorbar(mappable, ax=axes, orientation="horizontal", shrink=0.7, pad=0.02)
        shown = range(0, steps, -(-steps // 8))
        bar.set_ticks([step + 0.5 for step in shown], labels=[str(step) for step in shown])
        bar.set_label("step", fontsize=8)


def _draw_consensus(axes: "Axes", topologies: list[Any], steps: int, seed: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for topology, marker in zip(topologies, "osD^vP*Xh<>" * len(topologies)):
        # A logarithmic axis has no 0.
        distances = [max(distance, 1e-17) for distance in consensus_distances(topology, steps, seed)]
        axes.semilogy(range(steps + 1), distances, marker=marker, markersize=4, linewidth=1.4, label=_name(topology))
    axes.set(xlabel="steps taken", ylabel="consensus distance", xlim=(0, steps))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _name(topology: Any) -> str:
    return repr(topology).replace("Topology(", "(").replace("world_size=", "n=")
