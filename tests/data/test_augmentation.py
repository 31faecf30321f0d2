import importlib.util
import logging

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from hf_msn.data import augmentation
from hf_msn.data.augmentation import finish_views
from hf_msn.data.view_parameters import FACTORS, FLIP, GRAYSCALE, JITTER, NUM_PARAMETERS, ORDER, SIGMA

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
OPERATORS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
HAS_NUMBA = importlib.util.find_spec("numba") is not None


@pytest.fixture(params=["numba", "torch"])
def kernel(request, monkeypatch):
    """The compiled loop, and its slow twin of torch's operators."""
    if request.param == "numba":
        if not HAS_NUMBA:
            pytest.skip("numba is not installed")
    else:
        monkeypatch.setattr(augmentation, "has_numba", lambda: False)
    return request.param


def _crops(number: int, side: int, seed: int = 0) -> torch.Tensor:
    """Views with smooth parts, gray pixels, black and white."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (number, side, side, 3)).astype(np.uint8)
    values[:, : side // 4] = values[:, : side // 4, :, :1]
    values[:, side // 4 : side // 3] = 255 * (values[:, side // 4 : side // 3] > 127)
    return torch.from_numpy(values)


def _rows(number: int, seed: int = 0, sigmas: tuple[float, float] = (0.1, 2.0)) -> torch.Tensor:
    random = np.random.default_rng(seed)
    rows = np.zeros((number, NUM_PARAMETERS), np.float32)
    rows[:, FLIP], rows[:, GRAYSCALE] = random.random(number) < 0.5, random.random(number) < 0.3
    rows[:, JITTER] = random.random(number) < 0.8
    rows[:, FACTORS : FACTORS + 3] = random.uniform(0, 2, (number, 3))
    rows[:, FACTORS + 3] = random.uniform(-0.5, 0.5, number)
    rows[:, ORDER : ORDER + 4] = [random.permutation(4) for _ in range(number)]
    rows[:, SIGMA] = np.where(random.random(number) < 0.6, random.uniform(*sigmas, number), 0)
    return torch.from_numpy(rows)


def _by_torchvision(crop: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    view = crop.permute(2, 0, 1) / 255
    row = row.tolist()
    if row[FLIP]:
        view = F.horizontal_flip(view)
    if row[JITTER]:
        for place in range(4):
            operator = int(row[ORDER + place])
            view = OPERATORS[operator](view, row[FACTORS + operator])
    if row[GRAYSCALE]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if row[SIGMA]:
        radius = min(int(np.ceil(np.float32(4) * np.float32(row[SIGMA]))), view.shape[-1] - 1)
        view = F.gaussian_blur(view, [2 * radius + 1] * 2, [row[SIGMA]] * 2)
    return F.normalize(view, list(MEAN), list(STD))


def test_solarize_and_equalize_equal_torchvision(kernel):
    crops, rows = _crops(12, 33), _rows(12)
    rows[:, JITTER] = 0  # so that values stay those of 8 bits
    thresholds = torch.tensor([0.0, 0.3, 0.5, 1.0, 2.0, 2.0] * 2)
    tones = torch.stack([thresholds, torch.tensor([0.0, 1.0] * 6)], dim=1)
    finished = finish_views(crops, torch.cat([rows, tones], dim=1), MEAN, STD)
    for number in range(12):
        view = crops[number].permute(2, 0, 1)
        row = rows[number].clone()
        row[FLIP] = 0
        if rows[number, FLIP]:
            view = F.horizontal_flip(view)
        if row[GRAYSCALE]:
            continue  # a gray value is not of 8 bits
        if thresholds[number] <= 1:
            view = F.solarize(view, 255 * thresholds[number].item())
        if tones[number, 1]:
            view = F.equalize(view)
        expected = _by_torchvision(view.permute(1, 2, 0), row)
        torch.testing.assert_close(finished[number], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [96, 33, 5])
def test_operators_in_any_order_equal_torchvision(kernel, side):
    crops, rows = _crops(40, side), _rows(40)
    finished = finish_views(crops, rows, MEAN, STD)
    assert finished.shape == (40, 3, side, side) and finished.dtype == torch.float32
    for number in range(40):
        expected = _by_torchvision(crops[number], rows[number])
        torch.testing.assert_close(finished[number], expected, atol=1e-5, rtol=0)


def test_neutral_parameters_only_normalise(kernel, monkeypatch):
    crops = _crops(4, 6)
    expected = ((crops.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    rows = torch.zeros(4, NUM_PARAMETERS)
    rows[2, FLIP] = 1
    expected[2] = expected[2].flip(-1)
    for colored in (True, False):
        if not colored:
            monkeypatch.setattr(augmentation, "_finish_views_on_cpu", None)
        finished = finish_views(crops, rows, MEAN, STD, colored=colored)
        torch.testing.assert_close(finished.double(), expected, atol=1e-6, rtol=0)


def test_view_is_independent_of_its_batch_and_of_the_threads(kernel):
    crops, rows = _crops(13, 32), _rows(13)
    together = finish_views(crops, rows, MEAN, STD)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = finish_views(crops, rows, MEAN, STD)
    finally:
        torch.set_num_threads(threads)
    alone = torch.stack([finish_views(crops[i], rows[i], MEAN, STD) for i in range(13)])
    in_pairs = finish_views(crops[:12].view(6, 2, 32, 32, 3), rows[:12].view(6, 2, -1), MEAN, STD).flatten(0, 1)
    tolerance = 0 if kernel == "numba" else 1e-6
    for other in (threaded, alone, torch.cat([in_pairs, together[12:]])):
        torch.testing.assert_close(together, other, atol=tolerance, rtol=0)


def test_views_are_float32_under_autocast(kernel):
    crops, rows = _crops(6, 16), _rows(6)
    expected = finish_views(crops, rows, MEAN, STD)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(finish_views(crops, rows, MEAN, STD), expected)


def test_missing_numba_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(augmentation, "find_spec", lambda name: None)
    augmentation.has_numba.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                finish_views(_crops(1, 8), _rows(1), MEAN, STD)
    finally:
        augmentation.has_numba.cache_clear()
    assert ["numba" in record.message for record in caplog.records] == [True]


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_views_are_compiled_where_no_folder_can_hold_the_result(monkeypatch):
    from hf_msn.data import numba_augmentation

    def finish(crops, parameters, multiplier, offset, finished, start, stop):
        finished[start:stop] = 0.5

    monkeypatch.setattr(numba_augmentation, "_finish", finish)
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])  # neither the package's nor the user's
    monkeypatch.setattr(numba_augmentation, "compiled", numba_augmentation.compiled.__wrapped__)
    assert torch.equal(finish_views(_crops(2, 8), _rows(2), MEAN, STD), torch.full((2, 3, 8, 8), 0.5))
