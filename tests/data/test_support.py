import logging

import datasets
import numpy as np
import pytest
import torch

from hf_msn.data.datasets import as_crops
from hf_msn.data.decoding import BrokenImageError
from hf_msn.data.samplers import ClassStratifiedSampler
from hf_msn.data.support import SupportDataset, support_loader
from hf_msn.data.transforms import MultiViewTransform

TRANSFORM = MultiViewTransform(image_size=8, focal_views=0)
LABELS = [4, 9, 4, 2, 9, 2, 4, 9, 2, 4, 4, 9]
ROWS = [0, 1, 2, 4, 5, 7, 8, 9]


class Content:
    """A transform whose views are the image itself."""

    def global_views(self, image, num_views):
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1).float()
        return pixels.expand(num_views, *pixels.shape)


@pytest.fixture
def labelled(image_rows):
    def make(labels=LABELS, feature=None, broken: tuple[int, ...] = ()) -> datasets.Dataset:
        images = image_rows(len(labels), broken).select_columns("image")
        column = datasets.Dataset.from_dict(
            {"label": labels}, datasets.Features(label=feature or datasets.Value("int64"))
        )
        return datasets.concatenate_datasets([images, column], axis=1)

    return make


def _sampler(support: SupportDataset, **settings) -> ClassStratifiedSampler:
    settings = {"global_classes": 2, "global_images_per_class": 2, "rank": 0, "world_size": 1, **settings}
    return ClassStratifiedSampler(support.labels, **settings)


def _batches(dataset, *, rows=ROWS, steps: int = 4, workers: int = 0, views: int = 2, seed: int = 5, **settings):
    support = SupportDataset(dataset, rows, TRANSFORM, views_per_image=views, seed=seed)
    return list(support_loader(support, _sampler(support, num_steps=steps, **settings), num_workers=workers))


def _assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second):
        assert set(one) == set(other) == {"support_pixel_values", "support_labels"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batch_holds_the_drawn_images_with_their_labels(labelled, picture):
    support = SupportDataset(labelled(), ROWS, Content(), views_per_image=2)
    sampler = _sampler(support, num_steps=3)
    for step, batch in enumerate(support_loader(support, sampler)):
        rows = [ROWS[position] for position in sampler.batch(step)]
        assert batch["support_labels"].dtype == torch.int64
        # the views of one image next to each other
        assert batch["support_labels"].tolist() == [LABELS[row] for row in rows for _ in range(2)]
        expected = [np.asarray(picture(row)).transpose(2, 0, 1) for row in rows for _ in range(2)]
        np.testing.assert_array_equal(batch["support_pixel_values"].numpy(), np.stack(expected))


def test_no_label_outside_the_support_is_read(labelled, monkeypatch):
    read = []
    original = datasets.arrow_dataset.query_table

    def query_table(table, key, indices=None):
        if "label" in table.column_names:
            count = table.num_rows if indices is None else indices.num_rows
            places = np.arange(count)[key if not isinstance(key, range) else list(key)]
            rows = places if indices is None else np.array(indices.column(0).to_pylist())[places]
            read.extend(np.atleast_1d(rows).tolist())
        return original(table, key, indices=indices)

    monkeypatch.setattr(datasets.arrow_dataset, "query_table", query_table)
    dataset = labelled()
    _ = dataset[3]
    assert read == [3]  # the spy works
    read.clear()
    _batches(dataset)
    assert read == ROWS
    read.clear()
    _batches(dataset, rows=[row in ROWS for row in range(len(LABELS))])
    assert read == ROWS


def test_batches_do_not_depend_on_the_workers(labelled):
    alone = _batches(labelled())
    _assert_same(_batches(labelled(), workers=2), alone)
    _assert_same(_batches(labelled(), steps=2, workers=1, start_step=2), alone[2:])


@pytest.mark.parametrize("shard", ["classes", "images"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_have_the_views_of_one_rank(labelled, shard, world_size):
    # classes 4, 2 and 9 have 3, 2 and 3 labelled images: 4 of each repeat some
    labels = [*LABELS, 11]
    settings = {"rows": [*ROWS, 12], "global_classes": 4, "global_images_per_class": 4, "views": 1}
    whole = _batches(labelled(labels), **settings)
    parts = [
        _batches(labelled(labels), **settings, shard=shard, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, alone in enumerate(whole):
        by_class = {}
        for part in [part[step] for part in parts]:
            assert len(part["support_labels"]) == 16 // world_size
            for label, view in zip(part["support_labels"].tolist(), part["support_pixel_values"]):
                by_class.setdefault(label, []).append(view)
        # each class in the order of the ranks, which is that of the places
        for label in {4, 2, 9, 11}:
            expected = alone["support_pixel_values"][alone["support_labels"] == label]
            assert torch.equal(torch.stack(by_class[label]), expected)


def test_repeated_image_has_different_views(labelled):
    settings = {"rows": [3, 1], "views": 2, "global_classes": 1, "global_images_per_class": 3, "steps": 2}
    batches = _batches(labelled(), **settings)
    views = torch.cat([batch["support_pixel_values"] for batch in batches]).flatten(1)
    assert views.shape[0] == 2 * 3 * 2
    assert len({tuple(view.tolist()) for view in views}) == 12


def test_views_depend_on_seed_step_place_and_row_alone(labelled):
    support = SupportDataset(labelled(), ROWS, TRANSFORM, seed=5)
    views = support[(7, 3, 4)]["support_pixel_values"]
    fewer = SupportDataset(labelled(), [ROWS[4], 10], TRANSFORM, seed=5)
    torch.manual_seed(99)
    assert torch.equal(fewer[(7, 3, 0)]["support_pixel_values"], views)
    assert torch.equal(support.__getitems__([(1, 1, 1), (7, 3, 4)])[1]["support_pixel_values"], views)
    assert torch.equal(support[4 - len(ROWS)]["support_pixel_values"], support[(0, 0, 4)]["support_pixel_values"])
    with pytest.raises(IndexError):
        _ = support[len(ROWS)]
    others = [support[(8, 3, 4)], support[(7, 2, 4)]]
    others.append(SupportDataset(labelled(), ROWS, TRANSFORM, seed=6)[(7, 3, 4)])
    assert not any(torch.equal(other["support_pixel_values"], views) for other in others)


def test_loader_and_views_leave_the_generator_alone(labelled):
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    _batches(labelled())
    assert torch.equal(torch.rand(4), expected)


def test_support_has_rows_labels_and_names(labelled):
    feature = datasets.ClassLabel(names=list("abcdefghij"))
    support = SupportDataset(labelled(feature=feature), [9, 0, 5], TRANSFORM)
    assert (support.rows.tolist(), support.labels.tolist()) == ([0, 5, 9], [4, 2, 4])
    assert support.labels.dtype == np.int64
    assert support.class_names == list("abcdefghij")
    assert SupportDataset(labelled(), ROWS, TRANSFORM).class_names is None


def test_broken_image_is_replaced_by_the_next_of_its_class_and_logged_once(labelled, picture, caplog):
    support = SupportDataset(labelled(broken=(0, 2, 4, 6, 8)), ROWS, Content())
    with caplog.at_level(logging.WARNING):
        items = [support[position] for position in (0, 2, 3, 0, 7, 6)]
    # labelled rows of class 4: 0, 2, 9 (6 and 10 are not labelled); of class 9: 1, 4, 7; of class 2: 5, 8
    for item, row in zip(items, (9, 9, 7, 9, 9, 5)):
        np.testing.assert_array_equal(
            item["support_pixel_values"][0].numpy(), np.asarray(picture(row)).transpose(2, 0, 1)
        )
        assert item["support_labels"] == LABELS[row]
    assert support.num_broken == 4
    assert sorted(record.args[0].row for record in caplog.records) == [0, 2, 4, 8]


def test_class_without_a_readable_image_raises(labelled):
    with pytest.raises(BrokenImageError, match="row 7 "):
        _ = SupportDataset(labelled(broken=(7,)), ROWS, TRANSFORM, on_broken_image="raise")[5]
    feature = datasets.ClassLabel(names=list("abcdefghij"))
    with pytest.raises(BrokenImageError, match=r"class 2 \('c'\) .*\(2 tried") as caught:
        _ = SupportDataset(labelled(broken=(5, 8), feature=feature), ROWS, TRANSFORM)[4]
    assert (caught.value.row, caught.value.path) == (5, "photo_5.png")


def test_label_beyond_the_class_names_is_refused(labelled):
    dataset = labelled([0, 7, 1, 2])
    dataset.info.features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"])
    )
    with pytest.raises(ValueError, match=r"below 2, .* row 3 has label 2"):
        SupportDataset(dataset, [0, 2, 3], TRANSFORM)
    # beyond the names, but not labelled
    assert SupportDataset(dataset, [0, 2], TRANSFORM).labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        (lambda data: data.select_columns("image"), {}, "label"),
        (lambda data: data.select_columns("label"), {}, "image"),
        (lambda data: data.to_iterable_dataset(), {}, "IterableDataset"),
        (None, {"views_per_image": 0}, "`views_per_image` .* but is 0"),
        (None, {"on_broken_image": "ignore"}, "'ignore'"),
        (None, {"seed": -1}, "`seed` .* but is -1"),
        (None, {"transform": None}, "`global_views`"),
    ],
)
def test_arguments_out_of_range_are_refused(labelled, change, settings, named):
    with pytest.raises(ValueError, match=named):
        SupportDataset(change(labelled()) if change else labelled(), ROWS, **{"transform": TRANSFORM, **settings})


def test_sampler_of_other_labels_is_refused(labelled):
    support = SupportDataset(labelled(), ROWS, TRANSFORM)
    sampler = ClassStratifiedSampler(LABELS, global_images_per_class=1, rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"8 images, .* 12 other labels"):
        support_loader(support, sampler)


def test_crops_finished_in_a_batch_equal_the_views(labelled):
    support = SupportDataset(labelled(broken=(4,)), ROWS, TRANSFORM, views_per_image=2, seed=5)
    sampler = _sampler(support, num_steps=3)
    views = list(support_loader(support, sampler))
    crops = list(support_loader(as_crops(support), sampler))
    for one, other in zip(crops, views):
        assert one["support_pixel_values"].dtype == torch.uint8
        assert one["support_view_parameters"].shape == (8, 12)
        finished = TRANSFORM.finish(one)
        assert set(finished) == set(other) and torch.equal(finished["support_labels"], other["support_labels"])
        torch.testing.assert_close(finished["support_pixel_values"], other["support_pixel_values"], atol=1e-5, rtol=0)
