import numpy as np
import torch
from finetuning_runs import VIEWS, classifier_arguments, digits, suncet_arguments

from hf_msn import SupportDataset
from hf_msn.distributed import collectives
from hf_msn.finetuning.batches import LabelledBatches, classifier_loader, suncet_loader


def positions(batches) -> list[list[int]]:
    return [[position for _, _, position in batch] for batch in batches]


def test_an_epoch_has_every_image_once_in_batches_of_nearly_one_size():
    batches = positions(LabelledBatches(41, 20, seed=0))
    assert sorted(map(len, batches)) == [13, 14, 14]
    assert sorted(place for batch in batches for place in batch) == list(range(41))


def test_epochs_and_seeds_have_orders_of_their_own():
    batches = LabelledBatches(41, 20, seed=0)
    first = list(batches)
    batches.set_epoch(1)
    assert positions(batches) != positions(first) and {key[0] for batch in batches for key in batch} == {1}
    batches.set_epoch(0)
    assert list(batches) == first and positions(LabelledBatches(41, 20, seed=1)) != positions(first)


def test_ranks_share_out_the_batch_of_one_rank(monkeypatch):
    whole = positions(LabelledBatches(41, 20, seed=0))
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        parts.append(positions(LabelledBatches(41, 20, seed=0)))
    for one, first, second in zip(whole, *parts):
        assert len(first) == len(second)
        together = [place for pair in zip(first, second) for place in pair]
        assert together[: len(one)] == one and together[len(one) :] == one[: len(together) - len(one)]


def test_a_view_is_a_function_of_seed_epoch_and_row_and_labels_are_outputs(tmp_path):
    dataset, rows = digits()
    rows = rows[np.isin(np.array(dataset.select(rows)["label"][:]), (3, 8))]
    support = SupportDataset(dataset, rows, VIEWS, seed=3)
    loader = classifier_loader(support, np.array([3, 8]), classifier_arguments(tmp_path, global_batch_size=4))
    (first, *_), again = list(loader), list(loader)
    assert first["pixel_values"].equal(again[0]["pixel_values"])
    keys = next(iter(loader.batch_sampler))
    numbers = [dataset[int(rows[position])]["label"] for _, _, position in keys]
    assert first["labels"].tolist() == [(3, 8).index(number) for number in numbers]

    loader.batch_sampler.set_epoch(1)
    views = {
        key[2]: view
        for batch, keys in zip(loader, loader.batch_sampler)
        for key, view in zip(keys, batch["pixel_values"])
    }
    assert not any(torch.equal(views[key[2]], view) for key, view in zip(keys, first["pixel_values"]))
    # another batch size, other neighbours, the same view
    other = classifier_loader(support, np.array([3, 8]), classifier_arguments(tmp_path, global_batch_size=10))
    other.batch_sampler.set_epoch(1)
    (batch,), (keys,) = list(other), list(other.batch_sampler)
    assert all(views[key[2]].equal(view) for key, view in zip(keys, batch["pixel_values"]))


def test_supports_go_on_from_epoch_to_epoch(tmp_path):
    dataset, rows = digits()
    support = SupportDataset(dataset, rows, VIEWS, seed=3)
    loader = suncet_loader(support, suncet_arguments(tmp_path, global_support_images_per_class=2))
    assert len(loader) == 3  # 3 x 10 x 2 is the first to reach 50
    steps = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        steps += [keys[0][0] for keys in loader.batch_sampler]
    assert steps == [0, 1, 2, 3, 4, 5]
