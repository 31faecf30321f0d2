import itertools
import logging
from collections import Counter

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from hf_msn.data.datasets import (
    MultiViewCollator,
    MultiViewDataset,
    StreamingMultiViewDataset,
    as_crops,
    multi_view_dataset,
)
from hf_msn.data.decoding import BrokenImageError, decode_reduced_image
from hf_msn.data.transforms import MultiViewTransform

TRANSFORM = MultiViewTransform(image_size=8, focal_size=4, focal_views=1)


def _batches(dataset, workers: int = 0, **settings) -> dict[str, torch.Tensor]:
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=MultiViewCollator(), **settings)
    return _joined(loader)


def _joined(loader: DataLoader) -> dict[str, torch.Tensor]:
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _assert_same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _sorted(batch: dict) -> torch.Tensor:
    """Return the target views sorted by their pixels, to compare streams in any order."""
    views = batch["pixel_values"]
    return views[sorted(range(len(views)), key=lambda row: views[row].flatten().tolist())]


def test_views_and_broken_rows_do_not_depend_on_the_workers(image_rows):
    datasets_of_views = [MultiViewDataset(image_rows(7, broken=(0, 3)), TRANSFORM, seed=3) for _ in range(2)]
    first, second = (_batches(views, workers=2 * place) for place, views in enumerate(datasets_of_views))
    _assert_same(first, second)
    assert set(first) == {"pixel_values", "anchor_pixel_values", "focal_pixel_values"}
    assert [views.num_broken for views in datasets_of_views] == [2, 2]


def test_views_do_not_depend_on_what_was_read_before(image_rows):
    dataset = MultiViewDataset(image_rows(5), TRANSFORM)
    alone = dataset[3]
    torch.manual_seed(77)
    for row in range(3):
        _ = dataset[row]
    _assert_same(dataset[3], alone)
    _assert_same(dataset.__getitems__([0, 3])[1], alone)
    _assert_same(dataset[-2], alone)


def test_rows_epochs_and_seeds_draw_different_views(image_rows):
    one_image = image_rows(1)
    twins = datasets.concatenate_datasets([one_image, one_image])
    dataset = MultiViewDataset(twins, TRANSFORM, seed=0)
    views = [dataset[0], dataset[1], MultiViewDataset(twins, TRANSFORM, seed=1)[0]]
    dataset.set_epoch(1)
    views.append(dataset[0])
    assert len({tuple(view["pixel_values"].flatten().tolist()) for view in views}) == 4
    dataset.set_epoch(0)
    _assert_same(dataset[0], views[0])


def test_epoch_reaches_persistent_workers(image_rows):
    dataset = MultiViewDataset(image_rows(6), TRANSFORM)
    loader = DataLoader(dataset, 3, num_workers=2, persistent_workers=True, collate_fn=MultiViewCollator())
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(_joined(loader))
    for epoch in range(3):
        alone = MultiViewDataset(image_rows(6), TRANSFORM)
        alone.set_epoch(epoch)
        _assert_same(epochs[epoch], _batches(alone))
    assert not torch.equal(epochs[0]["pixel_values"], epochs[1]["pixel_values"])


def test_broken_row_is_replaced_by_the_next_readable_one_and_logged_once(image_rows, picture, caplog):
    dataset = MultiViewDataset(
        image_rows(5, broken=(1, 2, 4)), lambda image: {"pixel_values": torch.tensor(list(image.tobytes()))}
    )
    with caplog.at_level(logging.WARNING):
        seen = [dataset[row]["pixel_values"].tolist() for row in (0, 1, 2, 3, 4, 1)]
    assert seen == [list(picture(number).tobytes()) for number in (0, 3, 3, 3, 0, 3)]
    assert dataset.num_broken == 3
    assert sorted(record.args[0].row for record in caplog.records) == [1, 2, 4]


@pytest.mark.parametrize("streamed", [False, True])
def test_broken_images_are_decoded_once_and_many_of_them_are_said_at_once(image_rows, caplog, monkeypatch, streamed):
    decoded = []

    def count(value, *args, **settings):
        decoded.append(value["path"])
        return decode_reduced_image(value, *args, **settings)

    monkeypatch.setattr("hf_msn.data.datasets.decode_reduced_image", count)
    broken = (0, 2, 3, 7, 8, 9, 11, 12, 14, 15, 16, 19)
    images = image_rows(24, broken)
    dataset = multi_view_dataset(images.to_iterable_dataset() if streamed else images, TRANSFORM, shuffle_buffer=0)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        _batches(dataset)
    counts = Counter(decoded)
    assert [counts[f"photo_{row}.png"] for row in broken] == [1] * 12
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 13
    # after the tenth broken image, which is row 15
    assert [place for place, text in enumerate(warnings) if "10 of the first 16 images" in text] == [10]
    assert dataset.num_broken == 12


@pytest.mark.slow
def test_long_run_of_broken_rows_does_not_stop_training(image_rows):
    images = image_rows(3, broken=(0,))
    long = datasets.concatenate_datasets([images.select([1]), *[images.select([0])] * 2100, images.select([2])])
    dataset = MultiViewDataset(long, TRANSFORM)
    assert all(len(batch) for batch in (dataset[1], dataset[1500])) and dataset.num_broken == 2100
    stream = StreamingMultiViewDataset(long.to_iterable_dataset(), TRANSFORM, shuffle_buffer=0)
    assert len(list(stream)) == 2 and stream.num_broken == 2100


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_row_raises_on_request(image_rows, workers):
    dataset = MultiViewDataset(image_rows(6, broken=(4,)), TRANSFORM, on_broken_image="raise")
    batches = iter(DataLoader(dataset, 3, num_workers=workers, collate_fn=MultiViewCollator()))
    with pytest.raises(BrokenImageError) as caught:
        list(batches)
    if workers:
        # torch waits five seconds for a worker that raised if the garbage collector ends it
        batches._shutdown_workers()
    assert (caught.value.row, caught.value.path) == (4, "photo_4.png")


def test_dataset_without_a_readable_image_raises(image_rows):
    dataset = MultiViewDataset(image_rows(3, broken=(0, 1, 2)), TRANSFORM)
    with pytest.raises(BrokenImageError, match="photo_"):
        _ = dataset[1]


def test_images_that_datasets_would_decode_are_read_encoded(image_rows):
    decoding = image_rows(3, broken=(1,)).cast_column("image", datasets.Image(decode=True)).with_format("torch")
    dataset = MultiViewDataset(decoding, TRANSFORM)
    _assert_same(dataset[0], MultiViewDataset(image_rows(3), TRANSFORM)[0])
    _ = dataset[1]
    assert dataset.num_broken == 1


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (lambda images: images.select([]), {}, "no rows"),
        (lambda images: images.rename_column("image", "photo"), {}, "photo"),
        (None, {"on_broken_image": "ignore"}, "'ignore'"),
        (None, {"seed": -1}, "-1"),
        (lambda images: images.to_iterable_dataset(), {"shuffle_buffer": -1}, "`shuffle_buffer`"),
        (None, {"transform": None}, "`__call__`"),
        (lambda images: images.to_iterable_dataset(), {"transform": {"image_size": 8}}, "`__call__`"),
    ],
)
def test_arguments_out_of_range_are_refused(image_rows, change, settings, named):
    images = image_rows(1)
    with pytest.raises(ValueError, match=named):
        multi_view_dataset(change(images) if change else images, **{"transform": TRANSFORM, **settings})


@pytest.mark.parametrize("kind", [MultiViewDataset, StreamingMultiViewDataset])
def test_data_of_the_other_kind_is_refused(image_rows, kind):
    images = image_rows(2) if kind is StreamingMultiViewDataset else image_rows(2).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"`{type(images).__name__}`.*multi_view_dataset"):
        kind(images, TRANSFORM)


def test_stream_is_sharded_over_workers_with_the_same_views(image_rows):
    def stream():
        return StreamingMultiViewDataset(image_rows(8).to_iterable_dataset(num_shards=4), TRANSFORM, seed=5)

    one, two = _sorted(_batches(stream())), _sorted(_batches(stream(), workers=2))
    assert one.shape == (8, 3, 8, 8)
    assert torch.equal(one, two)
    _assert_same(_batches(stream(), workers=2), _batches(stream(), workers=2))


def test_stream_has_different_views_and_order_in_each_epoch(image_rows):
    def first_pixels(image):
        return {"pixel_values": torch.cat([torch.tensor(list(image.tobytes()[:3])), torch.rand(1)])}

    dataset = StreamingMultiViewDataset(image_rows(8).to_iterable_dataset(num_shards=2), first_pixels)
    loader = DataLoader(dataset, 4, num_workers=2, persistent_workers=True, collate_fn=MultiViewCollator())
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(_joined(loader)["pixel_values"])
    assert torch.equal(epochs[0], epochs[2])
    order = [epoch[:, :3].tolist() for epoch in epochs]
    assert order[0] != order[1] and sorted(order[0]) == sorted(order[1])
    assert not set(epochs[0][:, 3].tolist()) & set(epochs[1][:, 3].tolist())


def test_repeated_stream_continues_with_the_next_epoch(image_rows):
    stream = StreamingMultiViewDataset(image_rows(5).to_iterable_dataset(), TRANSFORM, seed=5)
    passes = []
    for epoch in (2, 3):
        stream.set_epoch(epoch)
        passes += [views["pixel_values"] for views in stream]
    stream.set_epoch(2)
    stream.repeat = True
    endless = [views["pixel_values"] for views in itertools.islice(stream, len(passes))]
    assert all(map(torch.equal, endless, passes))
    assert stream.epoch == 2


def test_stream_drops_and_counts_broken_images(image_rows, picture, caplog):
    def content(image):
        return {"pixel_values": torch.tensor(list(image.tobytes()))}

    rows = image_rows(5, broken=(1, 4)).to_iterable_dataset()
    dataset = StreamingMultiViewDataset(rows, content, shuffle_buffer=0)
    for _ in range(2):
        seen = [item["pixel_values"].tolist() for item in dataset]
        assert seen == [list(picture(number).tobytes()) for number in (0, 2, 3)]
        assert dataset.num_broken == 2
    assert "row 4 (path 'photo_4.png')" in caplog.text


def test_stream_without_a_readable_image_raises(image_rows):
    broken = image_rows(2, broken=(0, 1)).to_iterable_dataset()
    with pytest.raises(BrokenImageError, match="none of 2 images"):
        list(StreamingMultiViewDataset(broken, TRANSFORM))
    with pytest.raises(BrokenImageError, match="photo_"):
        list(StreamingMultiViewDataset(broken, TRANSFORM, on_broken_image="raise"))
    none = image_rows(2).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(ValueError, match="has none"):
        list(StreamingMultiViewDataset(none, TRANSFORM))


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_crops_finished_in_a_batch_equal_the_views(image_rows, streamed, workers):
    images = image_rows(9, broken=(4,))
    dataset = multi_view_dataset(images.to_iterable_dataset(num_shards=2) if streamed else images, TRANSFORM, seed=2)
    cut = as_crops(dataset)
    dataset.set_epoch(3)
    views, crops = _batches(dataset, workers), _batches(cut, workers)
    assert crops["pixel_values"].dtype == torch.uint8 and "view_parameters" in crops
    assert dataset.num_broken == 1  # shared by both
    finished = TRANSFORM.finish(crops)
    assert set(finished) == set(views)
    for name in views:
        torch.testing.assert_close(finished[name], views[name], atol=1e-5, rtol=0)


def test_items_with_different_names_are_refused():
    with pytest.raises(ValueError, match="other"):
        MultiViewCollator()([{"pixel_values": torch.zeros(3, 8, 8)}, {"other": torch.zeros(3, 8, 8)}])
