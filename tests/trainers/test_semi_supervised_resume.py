"""A run with supports goes on bit for bit after a stop, with the same supports, on one rank and on two."""

import json
import shutil

import pytest
import torch
from launch import run_ranks
from semi_supervised_runs import LABELLED_ROWS, digits, make_run, transform, watch
from short_runs import StopAt, assert_same_weights, end_workers, logged

from hf_msn import SupportDataset
from hf_msn.files import read_json, write_json
from hf_msn.trainers.checkpoints import CheckpointError

EVERY_SECOND_STEP = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(
    ("method", "stop", "settings"),
    [
        ("paws", 2, {"gradient_accumulation_steps": 2}),  # the next update, the last of its epoch, has one micro-batch
        ("paws", 3, {"gradient_accumulation_steps": 2, "use_lars": True}),  # and here the last update had
        ("suncet", 4, {"gradient_accumulation_steps": 2, "supervised_epochs": 1.9}),
        ("suncet", 7, {"supervised_epochs": 1}),
        pytest.param(
            "paws", 4, {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1}, marks=pytest.mark.slow
        ),
    ],
)
def test_resume_is_bit_exact_and_sees_the_same_supports(tmp_path, method, stop, settings):
    whole = make_run(tmp_path / "whole", method, save_strategy="steps", save_steps=stop, **settings)
    seen = watch(whole)
    whole.train()
    resumed = make_run(tmp_path / "resumed", method, **settings)
    seen_again = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))

    assert_same_weights(resumed.model, whole.model)
    assert logged(resumed) == logged(whole) and resumed.state.global_step == 8
    assert 0 < len(seen_again) < len(seen)
    if "dataloader_num_workers" in settings:
        end_workers(whole)
        end_workers(resumed)
    for again, first in zip(seen_again[::-1], seen[::-1]):
        assert again.keys() == first.keys()
        for name, value in first.items():
            assert torch.equal(again[name], value), name


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    make_run(folder, changes={"callbacks": [StopAt(2)]}, **EVERY_SECOND_STEP).train()
    return folder / "checkpoint-2"


def test_other_labelled_images_are_refused(stopped, tmp_path):
    saved = json.loads((stopped / "labelled_images.json").read_text())
    assert saved["rows"] == LABELLED_ROWS and saved["labels"] == [1, 5, 9, 1, 5, 9, 1, 5]
    for rows, shared in (([*LABELLED_ROWS[:-1], 25], 7), (LABELLED_ROWS[:-1], 7), ([0, 2, 10, 18], 0)):
        with pytest.raises(CheckpointError, match=f"8 there, {len(rows)} here, {shared} rows"):
            make_run(tmp_path, rows=rows).train(resume_from_checkpoint=str(stopped))
    others = digits().select([*range(5), 15, *range(6, 22)])  # another five in the same row
    changes = {"support_dataset": SupportDataset(others, LABELLED_ROWS, transform())}
    with pytest.raises(CheckpointError, match="8 there, 8 here, 8 rows"):
        make_run(tmp_path, changes=changes).train(resume_from_checkpoint=str(stopped))


def test_another_support_is_named_and_taken(stopped, tmp_path, caplog):
    labelled = SupportDataset(digits(), LABELLED_ROWS, transform(grayscale=0.5), seed=1, views_per_image=2)
    changes = {"support_dataset": labelled}
    run = make_run(tmp_path, max_steps=3, changes=changes, global_support_images_per_class=3)
    seen = watch(run)
    run.train(resume_from_checkpoint=str(stopped))
    assert "global_support_images_per_class 2 there, 3 here, max_steps 8 there, 3 here" in caplog.text
    assert "support_grayscale 0.0 there, 0.5 here, support_views_per_image 1 there, 2 here" in caplog.text
    assert "support_view_seed 0 there, 1 here" in caplog.text
    assert [len(inputs["support_labels"]) for inputs in seen] == [18]

    earlier = shutil.copytree(stopped, tmp_path / stopped.name)
    record = read_json(earlier / "run.json")
    del record["settings"]["support_views"]
    write_json(earlier / "run.json", record)
    (earlier / "checksums.sha256").unlink()
    caplog.clear()
    make_run(tmp_path, changes=changes).train(resume_from_checkpoint=str(earlier))
    assert "other settings" not in caplog.text


@pytest.mark.parametrize("has_record", [True, False])
@pytest.mark.parametrize("lars_first, missing", [(True, "betas"), (False, "trust_coeff")])
def test_a_checkpoint_of_another_optimizer_is_refused_by_name(tmp_path, lars_first, missing, has_record):
    make_run(tmp_path, use_lars=lars_first, changes={"callbacks": [StopAt(2)]}, **EVERY_SECOND_STEP).train()
    if not has_record:  # of an earlier version
        for name in ("run.json", "checksums.sha256"):
            (tmp_path / "checkpoint-2" / name).unlink()
    with pytest.raises(CheckpointError, match=r"LARS.*AdamW|AdamW.*LARS" if has_record else missing):
        make_run(tmp_path, use_lars=not lars_first).train(resume_from_checkpoint=True)


def _resume_on_this_rank(rank, folder):
    fields = {"timm_model": "resnet18", "timm_options": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}}
    results = {}
    with pytest.raises(
        ValueError,
        match=r"`global_support_classes` .* 2 ranks .* but is 3",
    ):
        make_run(f"{folder}/refused", support_shard="classes")
    for shard in ("classes", "images"):
        settings = {
            "support_shard": shard,
            "global_support_classes": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            **EVERY_SECOND_STEP,
        }
        whole = make_run(f"{folder}/{shard}", model_fields=fields, **settings)
        seen = watch(whole)
        whole.train()
        resumed = make_run(f"{folder}/{shard} resumed", model_fields=fields, **{**settings, "save_strategy": "no"})
        seen_again = watch(resumed)
        resumed.train(resume_from_checkpoint=f"{folder}/{shard}/checkpoint-2")
        results[shard] = {
            "whole": whole.model.state_dict(),
            "resumed": resumed.model.state_dict(),
            "supports": [inputs["support_pixel_values"] for inputs in seen],
            "supports again": [inputs["support_pixel_values"] for inputs in seen_again],
            "labels": [inputs["support_labels"].tolist() for inputs in seen],
            "losses": (logged(whole), logged(resumed)),
        }
    return results


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_resume_bit_exactly(tmp_path):
    ranks = run_ranks(_resume_on_this_rank, 2, str(tmp_path), timeout=120)
    for shard in ("classes", "images"):
        assert (tmp_path / shard / "checkpoint-2" / "rng_state_1.pth").is_file()  # there were two
        first_rank, second_rank = (result[shard] for result in ranks)
        for result in (first_rank, second_rank):
            assert all(torch.equal(result["resumed"][name], wanted) for name, wanted in first_rank["whole"].items())
            again = result["supports again"]
            assert len(again) == 3 and len(result["supports"]) == 7  # the third update ends the epoch, with one
            assert all(torch.equal(*pair) for pair in zip(again, result["supports"][4:]))
        assert first_rank["losses"][0] == first_rank["losses"][1] and len(first_rank["losses"][0]) == 4
        for first, second in zip(first_rank["labels"], second_rank["labels"]):
            if shard == "classes":  # 2 classes x 2 images: one class on each rank
                assert len(set(first)) == len(set(second)) == 1 and first != second
            else:
                assert sorted(first) == sorted(second) and len(set(first)) == 2
