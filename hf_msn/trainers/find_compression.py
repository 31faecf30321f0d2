"""Which sequence compression gives the best gradient for its cost, in the course of a run (arXiv 2410.22364)."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..checks import check_integer, check_number
from ..models.sequence_compression import SequenceCompression
from .pretraining_trainer import PretrainingTrainer

logger = logging.get_logger(__name__)

_COLUMNS = 2**20  # of the gradients that are multiplied at a time in float64


@dataclass
class GradientEstimate:
    """Estimates for the gradient of a strategy against the plain one, each with its standard error.

    The errors are those of the jackknife over mini-batches; of a bias of 0 they are about 1.5 times too large.

    Attributes:
        bias2 (`float`): |E g_s - E g|^2, unbiased, so that it can be below 0 where there is no bias.
        ca_variance (`float`): (cost / budget) tr Cov(g_s).
        ca_mse (`float`): Their sum, the cost-adjusted mean squared error.
    """

    bias2: float
    bias2_error: float
    ca_variance: float
    ca_variance_error: float
    ca_mse: float
    ca_mse_error: float


def compare_gradients(
    gradients: torch.Tensor, plain_gradients: torch.Tensor, cost: float = 1.0, budget: float = 1.0
) -> GradientEstimate:
    """Estimate squared bias, cost-adjusted variance and CA-MSE of a strategy from independent mini-batch gradients.

    With means m and sample covariances S of K gradients g_s and K0 plain ones,
    bias^2 = |m_s - m_0|^2 - tr S_s / K - tr S_0 / K0 and CA-MSE = bias^2 + (cost / budget) tr S_s.

    Args:
        gradients (`torch.Tensor` of shape `(K, P)`): Gradients of the strategy, one row per mini-batch, K >= 3.
        plain_gradients (`torch.Tensor` of shape `(K0, P)`): Without compression, of other mini-batches, K0 >= 3.
        cost (`float`, *optional*, defaults to 1): Cost of a gradient of the strategy, relative to a plain one.
        budget (`float`, *optional*, defaults to 1): Cost of an update, likewise: of how many gradients the mean is
            taken. The larger it is, the more the bias counts.

    Raises:
        ValueError: If there are fewer than 3 rows, the rows differ in length, or cost or budget is not above 0.
    """
    check_number("cost", cost, above=0)
    check_number("budget", budget, above=0, remedy="It is the cost of an update, in plain gradients.")
    shapes = [tuple(rows.shape) for rows in (gradients, plain_gradients)]
    if any(len(shape) != 2 or shape[0] < 3 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            "`gradients` (K, P) and `plain_gradients` (K0, P) must have 3 rows or more each, but have shapes "
            f"{shapes}. Take more mini-batches."
        )
    products = _products(gradients, plain_gradients)
    own, plain = np.arange(len(gradients)), len(gradients) + np.arange(len(plain_gradients))

    def estimate(own: np.ndarray, plain: np.ndarray) -> np.ndarray:
        trace, mean = _trace_and_mean(products[np.ix_(own, own)])
        plain_trace, plain_mean = _trace_and_mean(products[np.ix_(plain, plain)])
        distance2 = mean + plain_mean - 2 * products[np.ix_(own, plain)].mean()
        bias2 = distance2 - trace / len(own) - plain_trace / len(plain)
        ca_variance = cost / budget * trace
        return np.array([bias2, ca_variance, bias2 + ca_variance])

    values = estimate(own, plain)
    without_own = np.stack([estimate(np.delete(own, row), plain) for row in range(len(own))])
    without_plain = np.stack([estimate(own, np.delete(plain, row)) for row in range(len(plain))])
    variances = sum((len(left_out) - 1) * left_out.var(axis=0) for left_out in (without_own, without_plain))
    pairs = zip(values.tolist(), np.sqrt(variances).tolist())
    return GradientEstimate(*(number for pair in pairs for number in pair))


def _products(*gradients: torch.Tensor) -> np.ndarray:
    """Return the scalar products of all rows, in float64."""
    num_rows = sum(map(len, gradients))
    products = torch.zeros(num_rows, num_rows, dtype=torch.float64)
    for start in range(0, gradients[0].shape[1], _COLUMNS):
        columns = torch.cat([rows[:, start : start + _COLUMNS].double().cpu() for rows in gradients])
        products += columns @ columns.T
    return products.numpy()


def _trace_and_mean(products: np.ndarray) -> tuple[float, float]:
    """Return the trace of the sample covariance, and the squared norm of the mean."""
    mean = products.mean()
    return (np.trace(products) - len(products) * mean) / (len(products) - 1), mean


def find_compression(
    trainer: PretrainingTrainer,
    checkpoints: Mapping[float, str | os.PathLike | None],
    dropouts: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    patch_sizes: Sequence[int] | None = None,
    batches: int = 16,
    budget: float = 1.0,
    compress_targets: bool = False,
) -> dict[str, Any]:
    """Measure the gradients of a run under all compressions of a grid, and choose the one of least CA-MSE.

    At each checkpoint it takes `batches` mini-batches without compression and, of as many others, those under each
    strategy. Nothing is trained: the model has its weights back at the end. The gradients of a strategy and the plain
    ones are held in memory, 2 * `batches` times the parameters.

    Args:
        trainer ([`PretrainingTrainer`]): A trainer of the run, with its model and data.
        checkpoints (`Mapping`): Checkpoint folders by progress in [0, 1]; `None` for the weights that the model has.
        dropouts (`Sequence[float]`, *optional*): Rates of token dropout.
        patch_sizes (`Sequence[int]`, *optional*): Patch sizes in pixels; by default that of the model, and 1.5 and 2
            times that. A pair that leaves no patch of a view is left out.
        batches (`int`, *optional*, defaults to 16): Mini-batches per strategy and checkpoint, at least 3. Standard
            errors fall with their root.
        budget (`float`, *optional*, defaults to 1): As in [`compare_gradients`].
        compress_targets (`bool`, *optional*, defaults to `False`): Compress the targets like the other views.

    Returns:
        `dict`: `stages`, a schedule for [`SequenceCompressionCallback`] with the best strategy of each checkpoint from
            its progress on, and `measured`, a list with `progress`, `dropout`, `patch_size`, `cost` and the fields of
            [`GradientEstimate`] for each checkpoint and strategy.

    Raises:
        ValueError: If a value is out of range, no pair leaves a patch, or there is too little data.
    """
    check_integer("batches", batches, 3, remedy="Standard errors need 3.")
    check_number("budget", budget, above=0, remedy="It is the cost of an update, in plain gradients.")
    model = trainer.model
    SequenceCompression().check(model)
    strategies = list(_strategies(trainer, dropouts, patch_sizes, compress_targets))
    if not strategies or 0 not in checkpoints:
        raise ValueError(
            f"`checkpoints` must have one at progress 0, and a pair of `dropouts` {list(dropouts)} and `patch_sizes` "
            "must leave patches of each view. Lower them."
        )
    inputs = _mini_batches(trainer, 2 * batches)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    on_collapse, trainer.args.on_collapse = trainer.args.on_collapse, "ignore"  # nothing is trained
    measured, stages = [], []
    try:
        for progress in sorted(checkpoints):
            folder = checkpoints[progress]
            weights = state if folder is None else type(model).from_pretrained(folder).state_dict()
            trainer.state.global_step = round(progress * trainer.state.max_steps)
            plain, _ = _gradients(trainer, weights, SequenceCompression(), inputs[batches:], mask_seed=1)
            estimates = []
            for settings, compression in strategies:
                gradients, cost = _gradients(trainer, weights, compression, inputs[:batches], mask_seed=0)
                estimates.append(compare_gradients(gradients, plain, cost, budget))
                measured.append({"progress": progress, **settings, "cost": cost, **asdict(estimates[-1])})
                logger.info(" ".join(f"{name} {value:.4g}" for name, value in measured[-1].items()))
            best, _ = strategies[min(range(len(strategies)), key=lambda place: estimates[place].ca_mse)]
            views = {"views": {"target": best}} if compress_targets else {}
            if progress < 1 and (not stages or stages[-1] != {**stages[-1], **best}):
                stages.append({"progress": progress, **best, **views})
    finally:
        trainer.args.on_collapse, trainer.state.global_step = on_collapse, 0
        model.compression = None
        model.load_state_dict(state)
    return {"stages": stages, "measured": measured}


def _strategies(
    trainer: PretrainingTrainer, dropouts: Sequence[float], patch_sizes: Sequence[int] | None, compress_targets: bool
) -> Iterator[tuple[dict[str, Any], SequenceCompression]]:
    model, own_size = trainer.model, trainer.model.config.patch_size
    if patch_sizes is None:
        patch_sizes = sorted({own_size, round(1.5 * own_size), 2 * own_size})
    for patch_size, dropout in product(patch_sizes, dropouts):
        settings = {"dropout": dropout, "patch_size": patch_size}
        views = {"target": settings} if compress_targets else {}
        compression = SequenceCompression(**settings, views=views)
        try:
            compression.check(model, trainer.view_sizes())
        except ValueError as error:
            logger.warning(f"Left out: {error}")
        else:
            yield settings, compression


def _mini_batches(trainer: PretrainingTrainer, count: int) -> list[dict[str, torch.Tensor]]:
    loader, inputs = trainer.get_train_dataloader(), []
    for epoch in range(count):
        for part in (trainer.train_dataset, loader):  # other views in another order
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for batch in loader:
            trainer.state.global_step = len(inputs)  # each has a support of its own
            support = trainer._load_support() if getattr(trainer, "needs_support", lambda: False)() else {}
            inputs.append(trainer._prepare_inputs({**batch, **support}))
            if len(inputs) == count:
                return inputs
    raise ValueError("The training set does not fill one batch. Lower `per_device_train_batch_size`.")


def _gradients(
    trainer: PretrainingTrainer,
    weights: Mapping[str, torch.Tensor],
    compression: SequenceCompression,
    inputs: list[dict[str, torch.Tensor]],
    mask_seed: int,
) -> tuple[torch.Tensor, float]:
    """Return the gradients (K, P) of mini-batches on the CPU, and their cost relative to that without compression."""
    model = trainer.model.train()
    model.load_state_dict(weights)  # running statistics included
    model.seed_masks(mask_seed)
    model.compression = compression
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for batch in inputs:
        loss = trainer.compute_loss(model, batch)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]).cpu())
    return torch.stack(rows), compression.counts["flops"] / compression.counts["plain_flops"]


def plot_compressions(measured: list[dict[str, Any]], path: str | os.PathLike) -> None:
    """Write a PNG with three panels, as figure 4 of the paper: bias^2, cost-adjusted variance and CA-MSE of each
    strategy (row) by progress (column), relative to the CA-MSE of the first strategy. A frame marks the least.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError("A plot needs matplotlib, which is not installed: pip install 'hf_msn[demo]'.") from error
    points = sorted({row["progress"] for row in measured})
    unit = {row["progress"]: row["ca_mse"] for row in reversed(measured)}  # of the first strategy
    names = list(dict.fromkeys(f"{row['dropout']:g} @ {row['patch_size']}" for row in measured))
    figure = Figure(figsize=(3 + 1.1 * 3 * len(points), 1.6 + 0.35 * len(names)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"bias2": "squared bias", "ca_variance": "cost-adjusted variance", "ca_mse": "CA-MSE"}
    for axes, (key, title) in zip(panels, titles.items()):
        both = ([row[name] / unit[row["progress"]] for row in measured] for name in (key, f"{key}_error"))
        values, errors = (np.reshape(numbers, (len(points), len(names))).T for numbers in both)
        axes.imshow(values, cmap="Oranges", alpha=0.6, aspect="auto", vmin=0, vmax=2)
        for row, column in np.ndindex(values.shape):
            text = f"{values[row, column]:.2f}\n±{errors[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6)
        if key == "ca_mse":
            for column, row in enumerate(values.argmin(axis=0)):
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, linewidth=2))
        axes.set(title=title, xlabel="progress", xticks=range(len(points)), yticks=range(len(names)))
        axes.set_xticklabels([f"{point:.0%}" for point in points])
        axes.set_yticklabels(names)
    panels[0].set_ylabel("dropout @ patch size")
    figure.savefig(path, format="png", dpi=150)
