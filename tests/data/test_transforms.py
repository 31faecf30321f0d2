import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop
from torchvision.transforms.v2 import functional as F
from transformers import AutoImageProcessor, BitImageProcessor

from hf_msn.data.datasets import MultiViewCollator
from hf_msn.data.transforms import (
    MultiViewTransform,
    crop_box,
    cropped_as_in_torchvision,
    evaluation_image_processor,
    fine_crops,
    pixels_of,
    rotated_crops,
    whole_pixel_crops,
)

PLAIN = {
    "horizontal_flip": 0.0,
    "color_jitter_probability": 0.0,
    "grayscale": 0.0,
    "blur_probability": 0.0,
    "focal_views": 0,
    "image_mean": (0.0, 0.0, 0.0),
    "image_std": (1.0, 1.0, 1.0),
}
RATIO = (3 / 4, 4 / 3)
BILINEAR = Image.Resampling.BILINEAR
WHOLE = {"global_scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}


def _ramp(width: int, height: int) -> Image.Image:
    """An image whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.arange(width)
    pixels[:, :, 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def test_views_have_the_stated_shapes(picture):
    views = MultiViewTransform(image_size=32, focal_size=16, anchor_views=2, focal_views=3)(picture(1, (50, 40)))
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "pixel_values": (3, 32, 32),
        "anchor_pixel_values": (2, 3, 32, 32),
        "focal_pixel_values": (3, 3, 16, 16),
    }
    assert all(view.dtype == torch.float32 for view in views.values())
    assert set(MultiViewTransform(image_size=8, focal_views=0)(picture(1))) == {"pixel_values", "anchor_pixel_values"}
    only_focal = MultiViewTransform(image_size=8, focal_size=4, anchor_views=0, focal_views=2)(picture(1))
    assert only_focal["anchor_pixel_values"].shape == (0, 3, 8, 8)


def test_neutral_settings_give_the_normalised_image(picture):
    settings = {**PLAIN, **WHOLE, "image_mean": (0.1, 0.2, 0.3), "image_std": (0.5, 0.6, 0.7)}
    view = MultiViewTransform(image_size=8, **settings)(picture(3, (8, 8)))["pixel_values"]
    expected = (np.asarray(picture(3, (8, 8))) / 255 - settings["image_mean"]) / settings["image_std"]
    np.testing.assert_allclose(view, expected.transpose(2, 0, 1), atol=1e-5)


def test_global_views_are_drawn_like_the_target_view(picture):
    transform = MultiViewTransform(image_size=8, focal_size=4, anchor_views=3, focal_views=0, rotation=5.0)
    torch.manual_seed(5)
    views = transform(picture(1, (40, 30)))
    torch.manual_seed(5)
    global_views = transform.global_views(picture(1, (40, 30)).convert("RGBA"), 4)
    assert torch.equal(global_views[0], views["pixel_values"])
    assert torch.equal(global_views[1:], views["anchor_pixel_values"])
    assert global_views.shape == (4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"`num_views` .* but is 0"):
        transform.global_views(picture(1), 0)


def test_a_setting_does_not_change_the_draws_of_the_others():
    plain = MultiViewTransform(image_size=8, **PLAIN)
    flipping = MultiViewTransform(image_size=8, **{**PLAIN, "horizontal_flip": 1.0})
    torch.manual_seed(3)
    straight = plain(_ramp(40, 40))["anchor_pixel_values"]
    torch.manual_seed(3)
    assert torch.equal(flipping(_ramp(40, 40))["anchor_pixel_values"].flip(-1), straight)


def test_recipe_for_small_gray_images_keeps_them_gray_and_takes_overrides():
    transform = MultiViewTransform.for_small_grayscale(image_size=8, anchor_views=2, rotation=0.0)
    assert (transform.anchor_views, transform.rotation, transform.horizontal_flip) == (2, 0.0, 0.0)
    gray = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("RGB")
    views = transform(gray)["anchor_pixel_values"]
    assert torch.equal(views[:, 0], views[:, 1]) and torch.equal(views[:, 0], views[:, 2])


def test_crops_finished_in_a_batch_equal_the_views(picture):
    transform = MultiViewTransform(image_size=32, focal_size=16, anchor_views=2, focal_views=3)
    views, crops = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        views.append(transform(picture(seed, (90, 70))))
        torch.manual_seed(seed)
        crops.append(transform.crops(picture(seed, (90, 70))))
    assert {name: (tuple(value.shape), value.dtype) for name, value in crops[0].items()} == {
        "pixel_values": ((32, 32, 3), torch.uint8),
        "anchor_pixel_values": ((2, 32, 32, 3), torch.uint8),
        "focal_pixel_values": ((3, 16, 16, 3), torch.uint8),
        "view_parameters": ((6, 12), torch.float32),
    }
    batch = transform.finish({**MultiViewCollator()(crops), "other": torch.ones(4)})
    assert set(batch) == {*views[0], "other"} and batch["anchor_pixel_values"].shape == (4, 2, 3, 32, 32)
    for name, value in MultiViewCollator()(views).items():
        torch.testing.assert_close(batch[name], value, atol=1e-5, rtol=0)
    assert all(torch.equal(transform.finish(batch)[name], batch[name]) for name in batch)  # finished views stay


def test_view_parameters_have_their_distributions():
    transform = MultiViewTransform(image_size=8, focal_views=0, anchor_views=4999, blur_radius=(0.5, 1.5))
    torch.manual_seed(0)
    rows = transform.crops(_ramp(80, 80))["view_parameters"].double().numpy()
    flip, jitter, factors, order, gray, sigma = np.split(rows, [1, 2, 6, 10, 11], axis=1)
    for drawn, probability in ((flip, 0.5), (jitter, 0.8), (gray, 0.2), (sigma > 0, 0.5)):
        assert drawn.mean() == pytest.approx(probability, abs=4 * math.sqrt(0.25 / 5000))
    for column in range(3):
        assert stats.kstest(factors[:, column], stats.uniform(0.6, 0.8).cdf).pvalue > 0.01
    assert stats.kstest(factors[:, 3], stats.uniform(-0.1, 0.2).cdf).pvalue > 0.01
    assert stats.kstest(sigma[sigma > 0], stats.uniform(0.5, 1.0).cdf).pvalue > 0.01
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 0.01


def test_solarize_and_equalize_change_their_share_of_the_views_and_no_other_draw():
    settings = {"image_size": 4, "focal_views": 0, "anchor_views": 3999}
    torch.manual_seed(0)
    plain = MultiViewTransform(**settings).crops(_ramp(80, 80))
    torch.manual_seed(0)
    crops = MultiViewTransform(**settings, solarize=0.2, equalize=0.3).crops(_ramp(80, 80))
    rows = crops.pop("view_parameters")
    assert torch.equal(rows[:, :12], plain.pop("view_parameters")) and plain.keys() == crops.keys()
    assert all(torch.equal(plain[name], crops[name]) for name in plain)
    thresholds, equalized = rows[:, 12].double().numpy(), rows[:, 13].double().numpy()
    solarized = thresholds < 1.5
    for drawn, probability in ((solarized, 0.2), (equalized, 0.3)):
        assert drawn.mean() == pytest.approx(probability, abs=4 * math.sqrt(0.25 / 4000))
    assert stats.kstest(thresholds[solarized], stats.uniform(0, 256 / 255).cdf).pvalue > 0.01
    assert abs(np.corrcoef(solarized, equalized)[0, 1]) < 0.1
    inverted = MultiViewTransform(image_size=4, **PLAIN, **WHOLE, solarize=1.0)
    assert inverted.is_colored and not MultiViewTransform(**PLAIN).is_colored
    views = inverted(Image.new("RGB", (8, 8), "white"))["anchor_pixel_values"]
    assert views.max() == 0  # above any threshold


def test_transforms_with_the_same_normalisation_and_colour_finish_alike():
    transform = MultiViewTransform(image_size=32)
    assert transform.finishes_as(MultiViewTransform(image_size=64, focal_views=2, horizontal_flip=0.0))
    assert not transform.finishes_as(MultiViewTransform(image_std=(1.0, 1.0, 1.0)))
    assert not transform.finishes_as(MultiViewTransform.for_small_grayscale(8))
    assert not transform.finishes_as(None)


def test_reduction_is_the_largest_that_enlarges_no_crop():
    transform = MultiViewTransform(image_size=224, focal_size=96)
    torch.manual_seed(0)
    drawn = transform.draw()
    for size in ((500, 375), (1600, 1200), (4000, 3000), (8000, 6000)):
        sides = np.array([224, 224] + 10 * [96])
        boxes = np.array(drawn.boxes(size))
        spare = min(((boxes[:, 2] - boxes[:, 0]) / sides).min(), ((boxes[:, 3] - boxes[:, 1]) / sides).min())
        assert drawn.reduction(size) == max(times for times in (1, 2, 4, 8) if times <= max(spare, 1))
    assert drawn.reduction((500, 375)) == 1 and drawn.reduction((8000, 6000)) >= 4
    assert MultiViewTransform(image_size=4, focal_views=0, rotation=5.0).draw().reduction((4000, 3000)) == 1
    assert MultiViewTransform(image_size=4, focal_views=0).draw().reduction((63, 400)) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "`image_size` .* but is 0"),
        ({"anchor_views": -1}, "`anchor_views` .* but is -1"),
        ({"anchor_views": 0, "focal_views": 0}, "both 0"),
        ({"global_scale": (0.0, 1.0)}, "`global_scale` .* but is 0.0"),
        ({"global_scale": (0.9, 0.3)}, "`global_scale`"),
        ({"focal_scale": (0.1, 1.5)}, "`focal_scale`"),
        ({"focal_scale": 0.3}, "`focal_scale` .* but is 0.3"),
        ({"horizontal_flip": 1.5}, "`horizontal_flip` .* but is 1.5"),
        ({"color_jitter": -1}, "`color_jitter`"),
        ({"rotation": 200}, "`rotation`"),
        ({"translation": 1.0}, "`translation`"),
        ({"interpolation": "lanczos"}, "`interpolation` .* but is 'lanczos'"),
        ({"image_std": (1.0, 0.0, 1.0)}, "`image_std`"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiViewTransform(**settings)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (500, 375), (333, 500), (300, 300), (341, 256), (100, 450)])
@pytest.mark.parametrize("reloaded", [False, True])
def test_evaluation_crops_the_pixels_that_torchvision_crops(tmp_path, size, reloaded):
    processor = evaluation_image_processor(224, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    if reloaded:
        processor.save_pretrained(tmp_path)
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is BitImageProcessor  # without hf_msn, too
        processor = cropped_as_in_torchvision(AutoImageProcessor.from_pretrained(tmp_path))
    image = torch.from_numpy(np.array(_ramp(*size))).permute(2, 0, 1)
    expected = F.center_crop(F.resize(image, [256], antialias=True), [224, 224])
    seen = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(seen * 255, expected.float(), atol=1e-4, rtol=0)


def test_array_gives_the_views_of_its_image(picture):
    transform = MultiViewTransform(image_size=8, focal_views=0)
    views = []
    for image in (picture(1, (40, 30)), np.asarray(picture(1, (40, 30)))):
        torch.manual_seed(5)
        views.append((transform(image)["pixel_values"], transform.global_views(image, 2)))
    assert all(map(torch.equal, *views))
    for wrong in (torch.zeros(3, 8, 8), np.zeros((8, 8), np.int64), "digits.png"):
        with pytest.raises(ValueError, match="cannot be read"):
            transform(wrong)


def test_evaluation_resizes_crops_and_normalises():
    image = _ramp(80, 60)
    processor = evaluation_image_processor(28, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7))
    seen = processor(image, return_tensors="pt")["pixel_values"][0].double().numpy()
    resized = image.resize((int(80 * 32 / 60), 32), Image.Resampling.BILINEAR)
    left, top = (resized.width - 28) // 2, 2
    crop = np.asarray(resized, np.float64)[top : top + 28, left : left + 28]
    expected = (crop / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    np.testing.assert_allclose(seen, expected.transpose(2, 0, 1), atol=1.01 / 255 / 0.5)


def test_evaluation_processor_matches_the_transform_and_loads_with_transformers(tmp_path, picture):
    transform = MultiViewTransform.for_small_grayscale(image_size=8, global_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0))
    transform.rotation = transform.translation = 0.0
    processor = transform.evaluation_image_processor(crop_fraction=1.0)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    image = picture(1, (8, 8))
    seen = loaded(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(seen, transform(image)["pixel_values"], atol=1e-5, rtol=0)


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
