"""Predictors set from the correlation of their input, and the dynamics of a trained one (arXiv 2102.06810)."""

import itertools
import math

import numpy as np
import pytest
import torch
from loss_inputs import normal
from scipy.integrate import solve_ivp
from torch import nn

from hf_msn import byol_loss
from hf_msn.models.direct_predictor import InputCorrelation, direct_copy, direct_pred

DIM = 5


def eigen(matrix: np.ndarray) -> tuple[list[float], list[np.ndarray]]:
    """Eigenvalues and eigenvectors of a symmetric matrix by Jacobi's rotations."""
    size = len(matrix)
    rotated, vectors = matrix.copy(), np.eye(size)
    for _ in range(30):
        for i in range(size):
            for j in range(i + 1, size):
                angle = 0.5 * math.atan2(2 * rotated[i, j], rotated[j, j] - rotated[i, i])
                turn = np.eye(size)
                turn[i, i] = turn[j, j] = math.cos(angle)
                turn[i, j], turn[j, i] = math.sin(angle), -math.sin(angle)
                rotated, vectors = turn.T @ rotated @ turn, vectors @ turn
    return [rotated[i, i] for i in range(size)], [vectors[:, i] for i in range(size)]


def correlation(scale: float = 3.0, rank: int = DIM) -> torch.Tensor:
    rows = scale * normal(40, rank) @ normal(rank, DIM, seed=1)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("rank", [DIM, 2])
def test_direct_pred_equals_the_eigendecomposition_written_out(rank, eps):
    matrix = correlation(rank=rank)
    values, vectors = eigen(matrix.numpy())
    expected = np.zeros((DIM, DIM))
    for value, vector in zip(values, vectors):
        expected += max(math.sqrt(max(value, 0.0) / max(values)) + eps, 1e-4) * np.outer(vector, vector)
    np.testing.assert_allclose(direct_pred(matrix, eps).numpy(), expected, atol=1e-6 if rank < DIM else 1e-10)
    assert torch.allclose(direct_pred(100 * matrix, eps), direct_pred(matrix, eps))


def test_direct_copy_is_the_correlation_over_its_largest_eigenvalue():
    matrix = correlation()
    expected = matrix.numpy() / max(eigen(matrix.numpy())[0]) + 0.3 * np.eye(DIM)
    np.testing.assert_allclose(direct_copy(matrix, 0.3).numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("function", [direct_pred, direct_copy])
def test_no_input_and_no_number_give_a_weight_without_an_error(function):
    torch.testing.assert_close(function(torch.zeros(DIM, DIM), 0.2), 0.2 * torch.eye(DIM))
    assert function(torch.full((DIM, DIM), math.nan), 0.2).isnan().all()


def test_the_running_correlation_and_the_steps_at_which_the_predictor_is_set():
    tracker = InputCorrelation(DIM, "direct_pred", rho=0.4, eps=0.05, update_every=3).double()
    predictor, expected, weights = nn.Linear(DIM, DIM, bias=False).double(), None, []
    for step in range(7):
        mean = torch.zeros(DIM, DIM).double()
        for micro_batch in range(2):
            rows = normal(6, DIM, seed=10 * step + micro_batch)
            tracker.observe(rows)
            mean += sum(torch.outer(row, row) for row in rows) / 12
        with torch.no_grad():
            tracker.observe(normal(6, DIM))  # of an evaluation
        expected = mean if expected is None else 0.4 * expected + 0.6 * mean
        tracker.update(predictor)
        tracker.update(predictor)  # nothing was seen since
        torch.testing.assert_close(tracker.correlation, expected, rtol=1e-12, atol=0)
        weights.append(predictor.weight.detach().clone())
        if step % 3 == 0:
            torch.testing.assert_close(weights[-1], direct_pred(expected, 0.05), rtol=1e-10, atol=1e-12)
    changed = [not torch.equal(*pair) for pair in itertools.pairwise(weights)]
    assert changed == [False, False, True, False, False, True]
    tracker.eval().observe(normal(6, DIM))
    tracker.update(predictor)
    assert tracker.num_updates == 7


def test_the_logged_spectrum():
    tracker, predictor = InputCorrelation(DIM).double(), nn.Linear(DIM, DIM, bias=False).double()
    assert tracker.spectrum(predictor) == {}
    tracker.observe(3 * normal(20, DIM))
    tracker.update(predictor)
    values, vectors = eigen(tracker.correlation.numpy())
    weight = predictor.weight.detach().numpy()
    shares = [value / sum(values) for value in values]
    aligned = sum(
        share * abs(vector @ weight @ vector) / np.linalg.norm(weight @ vector)
        for share, vector in zip(shares, vectors)
    )
    assert tracker.spectrum(predictor) == pytest.approx(
        {
            "correlation_largest": max(values),
            "correlation_smallest": min(values),
            "correlation_rank": math.exp(-sum(share * math.log(share) for share in shares)),
            "predictor_alignment": aligned,
        }
    )
    assert "predictor_alignment" not in tracker.spectrum(nn.ReLU())


@pytest.mark.parametrize("field, value", [("rho", 1.0), ("eps", -1), ("update_every", 0), ("rule", "x")])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}`.*{value}"):
        InputCorrelation(DIM, **{"rule": "direct_pred", field: value})


# A linear network f = W x with a trained linear predictor, X = I and augmentations of variance SIGMA2.
SIGMA2, DECAY, RATE = 0.5, 0.05, 0.03
SIZE = 3


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of augmented views: their moments are exactly I and SIGMA2 I."""
    axes = math.sqrt(SIZE) * torch.cat([torch.eye(SIZE), -torch.eye(SIZE)]).double()
    image, first, second = (grid.flatten() for grid in torch.meshgrid(*[torch.arange(2 * SIZE)] * 3, indexing="ij"))
    noise = math.sqrt(SIGMA2) * axes
    return axes[image] + noise[first], axes[image] + noise[second]


def train(weight: torch.Tensor, predictor: torch.Tensor, steps: int):
    """Gradient descent on the paper's J with weight decay, in steps of RATE; yields F and W_p before each."""
    first, second = pairs()
    layer = nn.Linear(SIZE, SIZE, bias=False).double()
    layer.weight.data = predictor.clone()
    weight = weight.clone().requires_grad_()
    tracker = InputCorrelation(SIZE, rho=0.0).double()
    for _ in range(steps):
        outputs = torch.cat([first, second]) @ weight.T
        tracker.observe(outputs)
        tracker.update(layer)
        yield tracker, layer
        swapped = torch.cat(outputs.chunk(2)[::-1])
        loss = byol_loss(layer(outputs), swapped, normalize=False) / 4  # both ways, and the paper has 1/2
        for parameter, gradient in zip((weight, layer.weight), torch.autograd.grad(loss, (weight, layer.weight))):
            parameter.data -= RATE * (gradient + DECAY * parameter.data)


def test_a_trained_predictor_follows_the_equations_of_the_linear_network():
    # Modes p_j of W_p and s_j of W W^T: equations 11 and 12 of the paper, without moving average.
    p, s = np.array([0.3, 0.1, 0.02]), np.array([0.2, 0.05, 0.001])
    left, right = (torch.linalg.qr(normal(SIZE, SIZE, seed=seed))[0] for seed in (0, 1))
    weight = left @ torch.diag(torch.tensor(s).sqrt()) @ right.T
    predictor = left @ torch.diag(torch.tensor(p)) @ left.T

    def slope(_, modes):
        p, s = modes[:SIZE], modes[SIZE:]
        drive = 1 - (1 + SIGMA2) * p
        return np.concatenate([s * drive - DECAY * p, 2 * p * s * drive - 2 * DECAY * s])

    steps = 1500
    times = RATE * np.arange(steps)
    solution = solve_ivp(slope, (0, times[-1]), np.concatenate([p, s]), t_eval=times, rtol=1e-9, atol=1e-12).y
    followed = []
    for tracker, layer in train(weight, predictor, steps):
        F, W = tracker.correlation, layer.weight.detach()
        followed.append([*(left.T @ W @ left).diag(), *(left.T @ F @ left).diag() / (1 + SIGMA2)])
    np.testing.assert_allclose(np.array(followed).T, solution, atol=6e-3)
    # The fixed points: two modes grow, and the one below the threshold collapses.
    fixed = (1 + math.sqrt(1 - 4 * DECAY * (1 + SIGMA2))) / (2 * (1 + SIGMA2))
    np.testing.assert_allclose(solution[:SIZE, -1], [fixed, fixed, 0.0], atol=0.01)


def test_a_trained_predictor_aligns_with_its_input():
    symmetric = normal(SIZE, SIZE, seed=2)
    predictor = 0.2 * torch.eye(SIZE).double() + 0.1 * (symmetric + symmetric.T)
    alignment = []
    for step, (tracker, layer) in enumerate(train(0.5 * normal(SIZE, SIZE), predictor, 1001)):
        if step % 250 == 0:
            alignment.append(tracker.spectrum(layer)["predictor_alignment"])
    assert alignment[0] < 0.98 and alignment[-1] > 0.9999
