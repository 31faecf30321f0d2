r"""Multinomial logistic regression with an l2 penalty, solved by preconditioned L-BFGS, on CPU or GPU.

With rows `x_i` of `X` (N, D), `P` the probabilities `softmax(X W^T)` (N, C), `Y` the one-hot labels and
$\lambda = l2 / N$,

$$f(W) = \frac{1}{N} \sum_i -\log P_{i y_i} + \frac{\lambda}{2} \lVert W \rVert^2, \qquad
\nabla f(W) = \frac{1}{N} (P - Y)^\top X + \lambda W.$$

**Coordinates.** `A = X^T X / N = Q diag(a) Q^T`. The penalty is the same in every orthonormal basis, so `W = V Q^T` is
found through its coordinates `V`, exactly. With fewer images than dimensions the minimum lies in the span of the rows
(`X^T = Q_1 R`), so that `V` has only N columns.

**Preconditioner.** The Hessian of the loss is $\frac{1}{N} \sum_i (\mathrm{diag}(p_i) - p_i p_i^\top) \otimes x_i
x_i^\top$. Böhning (Multinomial logistic regression algorithm, 1992) bounds the first factor by a constant matrix,
$\frac{1}{2} (I - 1 1^\top / C)$, which makes the Hessian a multiple of `A`, diagonal in these coordinates. A bound
for all W is far too wide for any single one, so L-BFGS starts instead from the mean of that factor's diagonal at the
present W, $h_c = \frac{1}{N} \sum_i P_{ic} (1 - P_{ic})$: the entry for class c and direction k is $h_c a_k +
\lambda$. At W = 0 this is the exact Hessian where class weights sum to 0, as they do throughout.

**L-BFGS** is algorithm 7.4 of Nocedal & Wright (Numerical Optimization, 2nd ed.). Its steps meet the approximate Wolfe
conditions of Hager & Zhang (2005), which compare slopes and therefore still work where the decrease of f is lost in
rounding.

**Precision.** float32 while the gradient is well above float32's rounding, then float64.
"""

from collections import deque
from dataclasses import dataclass

import torch

# pairs of steps and gradient changes in the memory of L-BFGS
_MEMORY = 10
# share of the gradient at W = 0 below which float32 is not trusted
_FLOAT32_FLOOR = 1e-5
# multiplications per product below which float32 saves nothing
_SMALL = 2**24
# probabilities held at a time: 8 MiB in float32, which fit a processor's cache, and 1 GiB on a GPU
_PROBABILITIES = {"cpu": 2**21, "cuda": 2**28}
# rows on which the length of the first step is found
_FIRST_ROWS = 1024


@dataclass(frozen=True)
class SoftmaxSolution:
    """The result of `fit_softmax_regression`."""

    weights: torch.Tensor  # (C, D), float64, on the device of the inputs
    iterations: int  # in both precisions
    converged: bool  # no entry of the gradient exceeds `tol`
    objective: float
    largest_gradient: float  # largest absolute entry


@torch.no_grad()
def fit_softmax_regression(
    inputs: torch.Tensor, targets: torch.Tensor, num_classes: int, l2: float, max_iter: int = 300, tol: float = 1e-8
) -> SoftmaxSolution:
    """Find the minimum of the module's objective, from W = 0, with lambda = l2 / N. Deterministic.

    `inputs` (N, D) are float64 on the device to compute on, `targets` (N,) int64 in `[0, num_classes)`. It stops after
    `max_iter` iterations, or when no entry of the gradient exceeds `tol`.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        basis, coordinates, curvature = _eigenbasis(inputs)
        penalty = l2 / len(inputs)
        weights, gradient = _first_step(coordinates, targets, num_classes, curvature, penalty)
        largest = (gradient @ basis.T).abs().max().item()
        # TensorFloat-32 or bfloat16 products, if enabled, are too coarse for the end of either precision
        exact = torch.get_float32_matmul_precision() == "highest"
        small = coordinates.numel() * num_classes < _SMALL
        floor = _FLOAT32_FLOOR * largest
        iterations = 0
        if exact and not small and largest > tol:
            single = _Objective(coordinates.float(), targets, num_classes, curvature.float(), penalty)
            state = _minimize(single, weights.float(), basis.float(), max_iter, max(tol, floor))
            weights, iterations, objective, largest = state
            # remove float32's rounding of the sums over classes, which no later step can change
            weights = weights.double()
            weights -= weights.mean(dim=0)
            done = iterations == max_iter or (largest <= tol and tol >= floor)
        else:
            done = False
        if not done:
            double = _Objective(coordinates, targets, num_classes, curvature, penalty)
            state = _minimize(double, weights, basis, max_iter - iterations, tol)
            weights, more, objective, largest = state
            iterations += more
    # the minimum's class weights sum to 0; a remainder from rounding costs penalty and changes no probability
    weights = (weights - weights.mean(dim=0)) @ basis.T
    return SoftmaxSolution(weights, iterations, largest <= tol, objective, largest)


def _eigenbasis(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Q (D, R) with orthonormal columns, the coordinates X Q (N, R), and the eigenvalues of X^T X / N (R,)."""
    num_rows, dimension = inputs.shape
    basis = None
    if num_rows < dimension:
        basis, triangle = torch.linalg.qr(inputs.T)
        inputs = triangle.T.contiguous()
    eigenvalues, rotation = torch.linalg.eigh(inputs.T @ inputs)
    basis = rotation if basis is None else basis @ rotation
    return basis, inputs @ rotation, eigenvalues.clamp(min=0) / num_rows


def _first_step(
    coordinates: torch.Tensor, targets: torch.Tensor, num_classes: int, curvature: torch.Tensor, penalty: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Newton's step from W = 0, scaled by a search along it, and the gradient at W = 0.

    At W = 0 all probabilities are 1 / C, so neither costs a product with all rows and classes. Scores are linear in
    the length of the step: one product serves all lengths that are tried, on a part of the rows.
    """
    num_rows, rank = coordinates.shape
    # on the CPU the order of these sums is fixed
    sums = torch.zeros(num_classes, rank, dtype=torch.float64).index_add_(0, targets.cpu(), coordinates.cpu())
    gradient = (coordinates.mean(dim=0) / num_classes) - sums.to(coordinates.device) / num_rows
    step = -gradient / (curvature / num_classes + penalty)
    rows = slice(None, None, max(1, num_rows // _FIRST_ROWS))
    scores, own = coordinates[rows] @ step.T, targets[rows, None]
    penalty_slope = penalty * step.square().sum()
    # bisect, on a logarithmic scale, for the length at which the slope changes its sign
    low, high = -16.0, 16.0
    for _ in range(8):
        middle = (low + high) / 2
        probabilities = (scores * 2**middle).softmax(dim=1)
        slope = ((probabilities * scores).sum(dim=1, keepdim=True) - scores.gather(1, own)).mean()
        too_long = bool(slope + 2**middle * penalty_slope > 0)
        low, high = (low, middle) if too_long else (middle, high)
    return step * 2 ** ((low + high) / 2), gradient


class _Objective:
    """f, its gradient and the mean diagonals h of the softmax's Hessian, in coordinates and precision of `inputs`."""

    def __init__(
        self, inputs: torch.Tensor, targets: torch.Tensor, num_classes: int, curvature: torch.Tensor, penalty: float
    ):
        self.inputs, self.targets, self.num_classes = inputs, targets[:, None], num_classes
        self.curvature, self.penalty = curvature, penalty
        rows = max(1, _PROBABILITIES.get(inputs.device.type, _PROBABILITIES["cpu"]) // num_classes)
        self.chunks = [slice(start, start + rows) for start in range(0, len(inputs), rows)]
        self.buffer = inputs.new_empty(min(rows, len(inputs)), num_classes)
        # relative rounding of f, which a comparison of two values must allow for
        self.rounding = 64 * torch.finfo(inputs.dtype).eps

    def __call__(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = torch.zeros((), dtype=torch.float64, device=weights.device)
        gradient = torch.zeros_like(weights)
        diagonal = weights.new_zeros(self.num_classes)
        for chunk in self.chunks:
            inputs, targets = self.inputs[chunk], self.targets[chunk]
            scores = torch.mm(inputs, weights.T, out=self.buffer[: len(inputs)])
            largest = scores.amax(dim=1, keepdim=True)
            own = scores.gather(1, targets) - largest
            exponentials = scores.sub_(largest).exp_()
            sums = exponentials.sum(dim=1, keepdim=True)
            loss += (sums.log() - own).sum(dtype=torch.float64)
            inverse = sums.reciprocal()
            # P - Y without P: a row of exponentials, less its sum at the label, times x / sum
            diagonal += (exponentials.T @ inverse).squeeze(1)
            diagonal -= (exponentials.square().T @ inverse.square()).squeeze(1)
            exponentials.scatter_add_(1, targets, -sums)
            gradient.addmm_(exponentials.T, inputs * inverse)
        gradient.div_(len(self.inputs)).add_(weights, alpha=self.penalty)
        value = loss / len(self.inputs) + self.penalty / 2 * weights.double().square().sum()
        return value, gradient, diagonal.div_(len(self.inputs)).clamp_(min=0)

    def preconditioner(self, diagonal: torch.Tensor) -> torch.Tensor:
        """Return the inverse of `h_c a_k + lambda` (C, R)."""
        return torch.outer(diagonal, self.curvature).add_(self.penalty).reciprocal_()


def _minimize(
    objective: _Objective, weights: torch.Tensor, basis: torch.Tensor, max_iter: int, tol: float
) -> tuple[torch.Tensor, int, float, float]:
    """Run L-BFGS. Return weights, iterations, objective and largest entry of the gradient in original coordinates."""
    value, gradient, diagonal = objective(weights)
    pairs: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=_MEMORY)
    for iteration in range(max_iter + 1):
        largest = (gradient @ basis.T).abs().max().item()
        if largest <= tol or iteration == max_iter:
            break
        direction = _direction(gradient, pairs, objective.preconditioner(diagonal))
        found = _line_search(objective, weights, value, gradient, direction)
        if found is None and pairs:
            # the curvature in memory misleads: restart from the preconditioner alone
            pairs.clear()
            continue
        if found is None:
            break
        step, value, new_gradient, diagonal = found
        change, weights = new_gradient - gradient, weights + step
        curvature = torch.dot(step.flatten(), change.flatten())
        if curvature > 0:
            pairs.append((step, change, 1 / curvature))
        gradient = new_gradient
    return weights, iteration, value.item(), largest


def _direction(
    gradient: torch.Tensor, pairs: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], inverse: torch.Tensor
) -> torch.Tensor:
    """Return the direction of the two-loop recursion, with the preconditioner at the scale of the last pair."""
    result, coefficients = -gradient, []
    for step, change, factor in reversed(pairs):
        coefficients.append(factor * torch.dot(step.flatten(), result.flatten()))
        result.sub_(change * coefficients[-1])
    result.mul_(inverse)
    if pairs:
        _, change, factor = pairs[-1]
        result.div_(factor * torch.dot(change.flatten(), (change * inverse).flatten()))
    for (step, change, factor), coefficient in zip(pairs, reversed(coefficients)):
        result.add_(step * (coefficient - factor * torch.dot(change.flatten(), result.flatten())))
    # the gradient's class sums are 0 if those of W are; only the preconditioner leaves that subspace
    return result.sub_(result.mean(dim=0))


def _line_search(
    objective: _Objective, weights: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, direction: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return a step along `direction` and value, gradient and diagonal after it; `None` if rounding hides descent.

    Slopes of a convex function rise: a slope too far below 0 means too short, one too far above it too long.
    """
    first = torch.dot(gradient.flatten(), direction.flatten()).item()
    if not first < 0:
        return None
    allowed = value.item() + objective.rounding * abs(value.item())
    short, short_slope, long = 0.0, first, None
    length = 1.0
    for _ in range(20):
        step = length * direction
        new_value, new_gradient, diagonal = objective(weights + step)
        slope = torch.dot(new_gradient.flatten(), direction.flatten()).item()
        too_long = slope > -0.8 * first or not new_value.item() <= allowed
        if not too_long and slope >= 0.9 * first:
            return step, new_value, new_gradient, diagonal
        if too_long:
            long = length
        # where the straight line through both slopes is 0
        secant = short + (length - short) * short_slope / (short_slope - slope) if slope > short_slope else None
        if not too_long:
            short, short_slope = length, slope
        if long is None:
            length = min(max(2 * short, secant or 0.0), 10 * short)
        else:
            margin = 0.1 * (long - short)
            length = min(max(secant or 0.0, short + margin), long - margin)
    return None
