import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from hf_msn.evaluation import probes
from hf_msn.evaluation.metrics import rank_classes
from hf_msn.evaluation.probes import (
    KNNProbe,
    LinearProbe,
    LogisticProbe,
    SoftNearestNeighborProbe,
    centre_and_normalize,
)

PROBES = [LogisticProbe, KNNProbe, LinearProbe, SoftNearestNeighborProbe]


def prepared(features):
    rows = []
    for row in features.astype(np.float64):
        row = row - sum(row) / len(row)
        rows.append(row / math.sqrt(sum(value * value for value in row)))
    return np.array(rows)


@pytest.mark.parametrize(
    ("classes", "images", "l2"), [(3, 3, 0.0025), (3, 600, 0.0025), (1000, 10_000, 0.0025), (1000, 10_001, 0.075)]
)
def test_default_penalty_is_that_of_the_paper_for_imagenet_alone_above_10_images_per_class(classes, images, l2):
    labels = np.arange(images) % classes
    features = np.random.RandomState(0).normal(size=(images, 2))
    assert LogisticProbe(max_iter=1).fit(features, labels).fit_report["l2"] == l2
    assert LogisticProbe(l2=0.5, max_iter=1).fit(features, labels).fit_report["l2"] == 0.5


def test_each_feature_vector_is_centred_and_gets_unit_length(clusters):
    np.testing.assert_allclose(centre_and_normalize(clusters[0]), prepared(clusters[0]), rtol=1e-12)
    np.testing.assert_array_equal(centre_and_normalize(np.full((1, 3), 0.1, np.float32)), [[0, 0, 0]])


def test_knn_scores_are_the_weighted_vote_of_the_nearest(clusters):
    features, labels = clusters
    queries = np.random.RandomState(1).normal(size=(5, 6))
    scores = KNNProbe(k=7, temperature=0.2).fit(features, labels).predict_scores(queries)
    for query, row in zip(queries, scores):
        similarities = [float(np.dot(query, x) / math.sqrt(np.dot(query, query) * np.dot(x, x))) for x in features]
        nearest = sorted(range(len(features)), key=lambda i: -similarities[i])[:7]
        votes = [0.0, 0.0, 0.0]
        for i in nearest:
            votes[labels[i]] += math.exp(similarities[i] / 0.2)
        np.testing.assert_allclose(row, np.array(votes) / sum(votes), rtol=1e-9)


def test_knn_uses_all_images_when_there_are_fewer_than_k(clusters):
    probe = KNNProbe(k=20).fit(clusters[0][::20], clusters[1][::20])
    assert probe.fit_report == {"k": 3}
    assert (probe.predict_scores(clusters[0]) > 0).all()


def cosine(a, b):
    return math.fsum(x * y for x, y in zip(a, b)) / math.sqrt(
        math.fsum(x * x for x in a) * math.fsum(y * y for y in b)
    )


def log_soft_nearest_neighbor_reference(query, supports, labels, temperature):
    """Equation 1 of PAWS as it stands: decimal exponents do not underflow."""
    with localcontext(prec=40):
        weights = [(Decimal(cosine(query, support)) / Decimal(temperature)).exp() for support in supports]
        of_class = [sum(w for w, label in zip(weights, labels) if label == c) for c in sorted(set(labels))]
        return [float((weight / sum(weights)).ln()) for weight in of_class]


@pytest.mark.parametrize("temperature", [0.1, 0.001, 3e-5, 10.0])
def test_soft_nearest_neighbor_scores_are_the_logarithm_of_the_equation(clusters, temperature):
    features, labels = clusters
    rows = np.random.RandomState(2).permutation(60)[:37]  # classes of different size, in any order
    queries = 5 * np.random.RandomState(1).normal(size=(4, 6))
    probe = SoftNearestNeighborProbe(temperature).fit(features[rows], labels[rows])
    expected = [
        log_soft_nearest_neighbor_reference(
            query.tolist(), features[rows].tolist(), labels[rows].tolist(), temperature
        )
        for query in queries
    ]
    np.testing.assert_allclose(probe.predict_scores(queries), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1e-200, 0.001, 0.1, 100.0])
def test_soft_nearest_neighbor_ranks_every_class_at_any_temperature(temperature):
    angles = np.array([170.0, 20.0, 95.0, 60.0, 130.0, 5.0])
    supports = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1).astype(np.float32)
    scores = SoftNearestNeighborProbe(temperature).fit(supports, np.arange(6)).predict_scores(np.array([[1.0, 0.0]]))
    np.testing.assert_array_equal(rank_classes(scores, 6)[0], [5, 1, 3, 2, 4, 0])


def test_soft_nearest_neighbor_scores_are_the_same_in_chunks(clusters, monkeypatch):
    features, labels = clusters
    probe = SoftNearestNeighborProbe().fit(features[:30], labels[:30] % 2)
    expected = probe.predict_scores(features)
    monkeypatch.setattr(probes, "_SIMILARITIES", 7 * 30 + 5)
    np.testing.assert_allclose(probe.predict_scores(features), expected, rtol=1e-9, atol=1e-14)
    monkeypatch.setattr(probes, "_SIMILARITIES", 1)  # more supports than the bound: query by query
    np.testing.assert_allclose(probe.predict_scores(features), expected, rtol=1e-9, atol=1e-14)


def sgd_reference(features, labels, *, batches, learning_rate, affine, weight_decay=0.0, momentum=0.9):
    """Nesterov SGD of a softmax classifier on l2-normalised outputs of a LayerNorm, with loops, in float64."""
    inputs = []
    for row in features.astype(np.float64):
        inputs.append((row - row.mean()) / math.sqrt(row.var() + 1e-5))
    num_classes, dimension = labels.max() + 1, features.shape[1]
    learned = [np.zeros((num_classes, dimension)), np.zeros(num_classes), np.ones(dimension), np.zeros(dimension)]
    velocities = [np.zeros_like(one) for one in learned]
    for step, rows in enumerate(batches):
        weights, bias, scale, shift = learned
        gradients = [weight_decay * one for one in learned]
        for i in rows:
            y = scale * inputs[i] + shift
            length = math.sqrt((y * y).sum())
            x = y / length
            p = np.exp(weights @ x + bias)
            error = (p / p.sum() - np.eye(num_classes)[labels[i]]) / len(rows)
            back = weights.T @ error
            back = (back - x * (x @ back)) / length  # through y / |y|
            for gradient, term in zip(gradients, (np.outer(error, x), error, back * inputs[i], back)):
                gradient += term
        rate = learning_rate * (1 + math.cos(math.pi * step / len(batches))) / 2
        for place in range(4 if affine else 2):
            change = rate * gradients[place]
            velocities[place] = momentum * velocities[place] + change
            learned[place] = learned[place] - (change + momentum * velocities[place])
    weights, bias, scale, shift = learned
    outputs = [scale * x + shift for x in inputs]
    return np.array([weights @ (y / math.sqrt((y * y).sum())) + bias for y in outputs])


@pytest.mark.parametrize("settings", [{"affine": True}, {"affine": False}, {"affine": True, "weight_decay": 0.1}])
def test_linear_probe_uses_all_of_few_images_in_each_step(clusters, settings):
    features, labels = clusters
    probe = LinearProbe(epochs=10, device="cpu", **settings).fit(features, labels)
    expected = sgd_reference(features, labels, batches=[range(60)] * 10, learning_rate=6.4, **settings)
    np.testing.assert_allclose(probe.predict_scores(features), expected, rtol=1e-3, atol=1e-3)
    assert probe.fit_report["steps"] == 10


def test_linear_probe_uses_batches_in_the_seeded_order(clusters):
    features, labels = clusters
    probe = LinearProbe(batch_size=25, epochs=2, seed=3, learning_rate=1.0, device="cpu").fit(features, labels)
    generator = torch.Generator().manual_seed(3)
    epochs = [torch.randperm(60, generator=generator).tolist() for _ in range(2)]
    batches = [order[start : start + 25] for order in epochs for start in (0, 25, 50)]
    expected = sgd_reference(features, labels, batches=batches, learning_rate=1.0, affine=True)
    np.testing.assert_allclose(probe.predict_scores(features), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", PROBES)
def test_fitting_twice_gives_identical_scores_and_draws_nothing_globally(make, clusters):
    probe, state = make(), torch.get_rng_state()
    first = probe.fit(*clusters).predict_scores(clusters[0])
    np.testing.assert_array_equal(probe.fit(*clusters).predict_scores(clusters[0]), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", PROBES)
def test_columns_are_the_sorted_labels(make, clusters):
    features, labels = clusters
    probe = make().fit(features, np.array([40, 7, 12])[labels])
    np.testing.assert_array_equal(probe.classes_, [7, 12, 40])
    guesses = probe.predict(features)
    best = [list(row).index(max(row)) for row in probe.predict_scores(features)]
    np.testing.assert_array_equal(guesses, [[7, 12, 40][column] for column in best])
    assert (guesses == np.array([40, 7, 12])[labels]).mean() > 0.8


@pytest.mark.parametrize("make", PROBES)
@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (np.ones((3, 2)), [1, 1, 1], "at least 2 classes, but all 3 are 1"),
        (np.array([[1.0, 2.0], [np.nan, 1.0]]), [0, 1], "1 of 2 rows hold NaN or infinity, the first is row 1"),
        (np.zeros((0, 2)), [], r"\(0, 2\)"),
        (np.ones((3, 2)), [0, 1], r"\(3,\), .* but has \(2,\)"),
        (np.ones(3), [0, 1, 1], r"but has \(3,\)"),
    ],
)
def test_inputs_that_cannot_be_fitted_are_refused(make, features, labels, message):
    with pytest.raises(ValueError, match=message):
        make().fit(features, np.array(labels))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogisticProbe(l2=0), "`l2` .* but is 0"),
        (lambda: LogisticProbe(max_iter=0), "`max_iter` .* but is 0"),
        (lambda: KNNProbe(k=0), "`k` .* but is 0"),
        (lambda: KNNProbe(temperature=0), "`temperature` .* but is 0"),
        (lambda: SoftNearestNeighborProbe(0), "`temperature` .* but is 0"),
        (lambda: SoftNearestNeighborProbe(1e-320), "`temperature` .* but is 1e-320"),
        (lambda: LinearProbe(learning_rate=-1), "`learning_rate` .* but is -1"),
        (lambda: LinearProbe(momentum=1), "`momentum` .* but is 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", PROBES)
def test_a_probe_predicts_after_its_fit_and_for_features_of_its_width_only(make, clusters):
    probe = make()
    for predict in (probe.predict, probe.predict_scores):
        with pytest.raises(ValueError, match=f"{make.__name__} must be fitted"):
            predict(clusters[0])
    probe.fit(*clusters)
    for predict in (probe.predict, probe.predict_scores):
        with pytest.raises(ValueError, match=r"must have 6 dimensions.*but has 5"):
            predict(clusters[0][:, :5])
