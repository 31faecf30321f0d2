import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop
from torchvision.transforms.v2 import functional as F

from hf_msn.data.crops import crop_box, fine_crops, pixels_of, rotated_crops, whole_pixel_crops

RATIO = (3 / 4, 4 / 3)
BILINEAR = Image.Resampling.BILINEAR


def _ramp(width: int, height: int) -> Image.Image:
    """An image whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.arange(width)
    pixels[:, :, 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def _random_rows(number: int) -> list[list[float]]:
    return torch.rand(number, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.05, 0.3)])
def test_fine_boxes_have_the_given_areas_and_ratios(scale):
    areas, ratios = [], []
    for random in _random_rows(3000):
        left, top, right, bottom = crop_box((100, 80), scale, RATIO, random, whole_pixels=False)
        assert 0 <= left < right <= 100 and 0 <= top < bottom <= 80
        areas.append((right - left) * (bottom - top) / 8000)
        ratios.append((right - left) / (bottom - top))
    assert scale[0] - 1e-9 <= min(areas) and max(areas) <= scale[1] + 1e-9
    assert min(ratios) >= 0.75 - 1e-9 and max(ratios) <= 4 / 3 + 1e-9
    if scale[1] < 0.5:
        # small crops always fit: area uniform, ratio log-uniform
        assert np.mean(areas) == pytest.approx(sum(scale) / 2, abs=0.005)
        assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.02)
        assert np.std(np.log(ratios)) == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [(0.3, 1.0), (0.05, 0.3)])
@pytest.mark.parametrize("size", [(500, 375), (120, 300)])
def test_whole_pixel_boxes_have_the_distribution_of_torchvision(scale, size):
    ours = np.array([crop_box(size, scale, RATIO, random, whole_pixels=True) for random in _random_rows(4000)])
    torch.manual_seed(1)
    image = torch.empty(3, size[1], size[0])
    theirs = np.array([TorchvisionCrop.get_params(image, scale, RATIO) for _ in range(4000)])
    theirs = np.stack([theirs[:, 1], theirs[:, 0], theirs[:, 1] + theirs[:, 3], theirs[:, 0] + theirs[:, 2]], axis=1)
    assert ours.dtype == theirs.dtype == np.int64

    def features(boxes):
        left, top, right, bottom = boxes.T
        width, height = right - left, bottom - top
        return [width * height, np.log(width / height), left, top, (left + right) / 2, (top + bottom) / 2]

    for one, other in zip(features(ours), features(theirs)):
        assert stats.ks_2samp(one, other).pvalue > 0.01
    assert ours.min() >= 0 and ours[:, 2].max() <= size[0] and ours[:, 3].max() <= size[1]


def test_very_long_image_is_cropped_in_the_middle():
    never = [0.5] * 40
    box = crop_box((1000, 10), (1.0, 1.0), RATIO, never, whole_pixels=False)
    assert box == pytest.approx((500 - 20 / 3, 0, 500 + 20 / 3, 10))
    for width, height in ((1000, 70), (70, 1000)):
        left, top, right, bottom = crop_box((width, height), (1.0, 1.0), RATIO, never, whole_pixels=True)
        y, x, h, w = TorchvisionCrop.get_params(torch.empty(3, height, width), (1.0, 1.0), RATIO)
        assert (left, top, right - left, bottom - top) == (x, y, w, h)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_whole_pixel_crops_equal_torchvision_to_the_bit(picture, interpolation):
    image = picture(4, (130, 97))
    boxes = [(0, 0, 130, 97), (13, 5, 77, 69), (20, 30, 41, 47), (1, 2, 9, 12), (50, 0, 114, 97)]
    ours = whole_pixel_crops(pixels_of(image), boxes, 64, interpolation)
    assert ours.shape == (5, 64, 64, 3) and ours.dtype == torch.uint8
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for crop, (left, top, right, bottom) in zip(ours, boxes):
        expected = F.resized_crop(
            pixels, top, left, bottom - top, right - left, [64, 64], InterpolationMode(interpolation), antialias=True
        )
        assert torch.equal(crop.permute(2, 0, 1), expected)
    pillows = fine_crops(image, boxes[:1], 64, interpolation)  # at the edges of other boxes Pillow looks beyond them
    assert (ours[:1].int() - pillows.int()).abs().max() <= 1  # the same filter, rounded in another way


def test_fine_crops_equal_pillow(picture):
    image, box = picture(1, (20, 15)), (1.25, 2.5, 13.75, 11.0)
    crop = fine_crops(image, [box], 8, "bilinear")[0]
    np.testing.assert_array_equal(crop, np.asarray(image.resize((8, 8), BILINEAR, box=box)))
    assert fine_crops(image, [], 8, "bilinear").shape == (0, 8, 8, 3)


@pytest.mark.parametrize("image_size", [8, 20])
def test_rotation_by_90_degrees_is_exact(image_size):
    image = _ramp(20, 20)
    box, angle = (0.0, 0.0, 20.0, 20.0), math.radians(90)
    (rotated,) = rotated_crops(image, [box], image_size, "bilinear", [angle], [(0.0, 0.0)])
    resized = np.asarray(image.resize((image_size, image_size), BILINEAR)).astype(int)
    np.testing.assert_allclose(rotated.numpy().astype(int), np.rot90(resized), atol=1)


def test_translation_moves_by_the_share_of_the_side():
    (moved,) = rotated_crops(_ramp(20, 20), [(0.0, 0.0, 20.0, 20.0)], 20, "bilinear", [0.0], [(0.2, 0.0)]).numpy()
    np.testing.assert_array_equal(moved[:, 4:, 0], np.asarray(_ramp(20, 20))[:, :-4, 0])
    assert (moved[:, :4] == 0).all()
