"""SuNCEtTrainer: labels until `supervised_epochs` and not a step longer."""

import pytest
from semi_supervised_runs import load_images, make_run, transform, watch
from short_runs import assert_same_weights, logged

from hf_msn import MultiViewDataset, SupportDataset, multi_view_dataset


def spy_on_labelled_images(monkeypatch) -> list[tuple]:
    keys, read = [], SupportDataset.__getitems__

    def spied(self, asked_for):
        keys.extend(asked_for)
        return read(self, asked_for)

    monkeypatch.setattr(SupportDataset, "__getitems__", spied)
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("supervised_epochs, supervised", [(0, 0), (0.6, 3), (1, 5), (None, 6)])
def test_after_the_supervised_epochs_labelled_images_take_part_in_the_statistics_alone(
    tmp_path, monkeypatch, supervised_epochs, supervised
):
    keys = spy_on_labelled_images(monkeypatch)
    # 5 micro-batches per epoch
    trainer = make_run(tmp_path, "suncet", supervised_epochs=supervised_epochs, max_steps=6)
    seen = watch(trainer)
    trainer.train()
    read = 0 if supervised_epochs == 0 else 6  # none for SimCLR alone
    assert ["support_pixel_values" in inputs for inputs in seen] == [read > 0] * 6
    assert sorted({key[0] for key in keys}) == list(range(read)) and len(keys) == 6 * read
    suncet, nt_xent, loss = logged(trainer, "suncet"), logged(trainer, "nt_xent"), logged(trainer)
    for step in range(1, 7):
        assert loss[step] == pytest.approx(nt_xent[step] + suncet[step], rel=1e-5)
        assert (suncet[step] > 0.01) == (step <= supervised)


def test_the_last_updates_are_unsupervised_with_accumulation(tmp_path):
    trainer = make_run(tmp_path, "suncet", supervised_epochs=1, gradient_accumulation_steps=2, max_steps=6)
    seen, outputs = watch(trainer), []
    trainer.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    trainer.train()
    # 5 micro-batches per epoch, in updates of 2, 2 and 1.
    assert [output.suncet is not None for output in outputs] == [True] * 5 + [False] * 5
    assert all("focal_pixel_values" not in inputs or inputs["focal_pixel_values"].shape[1] == 0 for inputs in seen)


def test_without_supervised_epochs_labels_do_not_change_the_run(tmp_path):
    runs = [
        make_run(tmp_path / str(n), "suncet", rows=rows, supervised_epochs=0, max_steps=2)
        for n, rows in enumerate((None, [2, 12, 3]))
    ]
    for run in runs:
        run.train()
    assert_same_weights(runs[0].model, runs[1].model)


def test_evaluation_gives_a_loss(tmp_path):
    images = MultiViewDataset(load_images("digits").select(range(40, 48)), transform("suncet"), seed=5)
    trainer = make_run(tmp_path, "suncet", changes={"eval_dataset": images})
    assert 0 < trainer.evaluate()["eval_loss"] < 20


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"global_support_images_per_class": 1}, "`global_support_images_per_class` is 1"),
        ({"supervised_epochs": -1.0}, "`supervised_epochs` .* -1.0"),
        ({"supervised_epochs": float("nan")}, "`supervised_epochs` .* nan"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_run(tmp_path, "suncet", **settings).train()


def test_one_image_in_two_views_is_enough(tmp_path):
    trainer = make_run(tmp_path, "suncet", global_support_images_per_class=1, views_per_image=2, max_steps=1)
    seen = watch(trainer)
    trainer.train()
    assert sorted(seen[0]["support_labels"].tolist()) == [1, 1, 5, 5, 9, 9]


def test_small_crops_and_streams_are_refused(tmp_path):
    images = load_images("digits").select(range(20))
    crops = MultiViewDataset(images, transform("suncet", focal_views=1))
    with pytest.raises(ValueError, match=r"`focal_views` .* 1"):
        make_run(tmp_path, "suncet", changes={"train_dataset": crops}).train()
    stream = multi_view_dataset(images.to_iterable_dataset(), transform("suncet"), seed=3)
    with pytest.raises(ValueError, match="`supervised_epochs`"):
        make_run(tmp_path, "suncet", changes={"train_dataset": stream}, supervised_epochs=1).train()
    trainer = make_run(tmp_path, "suncet", changes={"train_dataset": stream}, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
