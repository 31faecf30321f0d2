import math

import pytest
import torch
from loss_inputs import normal, softmax_rows

from hf_msn.losses.soft_nearest_neighbor import sharpen, soft_nearest_neighbor


def loop_soft_nearest_neighbor(queries, supports, labels, temperature):
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b)) / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))

    rows = []
    for query in queries.tolist():
        weights = [math.exp(cosine(query, support) / temperature) for support in supports.tolist()]
        rows.append(
            [
                sum(w * row[c] for w, row in zip(weights, labels.tolist())) / sum(weights)
                for c in range(labels.shape[1])
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def loop_sharpen(probabilities, temperature):
    rows = []
    for row in probabilities.tolist():
        powers = [p ** (1 / temperature) for p in row]
        rows.append([power / sum(powers) for power in powers])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_soft_nearest_neighbor_equals_the_loop(temperature):
    queries, supports = normal(3, 5, seed=1), 4 * normal(7, 5, seed=2)
    labels = softmax_rows(7, 4, seed=3)
    expected = loop_soft_nearest_neighbor(queries, supports, labels, temperature)
    torch.testing.assert_close(
        soft_nearest_neighbor(queries, supports, labels, temperature), expected, rtol=1e-12, atol=1e-14
    )
    in_float32 = soft_nearest_neighbor(queries.float(), supports.float(), labels.float(), temperature)
    torch.testing.assert_close(in_float32.double(), expected, rtol=1e-5, atol=1e-7)


def test_soft_nearest_neighbor_gives_right_gradients_to_queries_and_supports():
    labels = softmax_rows(6, 3, seed=3)
    inputs = (normal(2, 4, seed=1).requires_grad_(), normal(6, 4, seed=2).requires_grad_())
    assert torch.autograd.gradcheck(lambda q, s: soft_nearest_neighbor(q, s, labels, 0.1), inputs)


def test_integer_labels_of_supports_are_taken_as_one_hot_rows():
    queries, supports = normal(3, 5, seed=1), normal(4, 5, seed=2)
    one_hot = torch.eye(2, dtype=torch.int64)[[0, 1, 1, 0]]
    expected = loop_soft_nearest_neighbor(queries, supports, one_hot, 0.1)
    torch.testing.assert_close(
        soft_nearest_neighbor(queries, supports, one_hot, 0.1), expected, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("temperature", [0.05, 0.25, 0.5, 1.0, 2.0])
def test_sharpen_equals_the_loop(temperature):
    probabilities = softmax_rows(4, 6)
    torch.testing.assert_close(
        sharpen(probabilities, temperature), loop_sharpen(probabilities, temperature), rtol=1e-12, atol=0
    )


def test_sharpen_does_not_underflow_where_all_powers_would():
    # 1000 entries of about 1 / 1000: to the power 1 / 0.05 they are 1e-60, which float32 does not hold.
    probabilities = torch.full((1, 1000), 1e-3)
    probabilities[0, 7] = 2e-3
    sharpened = sharpen(probabilities, 0.05)
    assert sharpened[0, 7].item() == pytest.approx(2**20 / (2**20 + 999), rel=1e-4)
    assert sharpened.sum().item() == pytest.approx(1.0, rel=1e-5)


def test_sharpen_keeps_zeros_and_its_gradient_is_right():
    assert sharpen(torch.tensor([[0.0, 0.75, 0.25]]), 0.5).tolist()[0] == pytest.approx([0.0, 0.9, 0.1])
    probabilities = softmax_rows(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: sharpen(p, 0.25), (probabilities,))


def test_supports_without_a_row_of_labels_each_are_an_error():
    with pytest.raises(ValueError, match="`supports` has 4 rows and `support_labels` 5"):
        soft_nearest_neighbor(normal(2, 3), normal(4, 3), softmax_rows(5, 2), 0.1)
