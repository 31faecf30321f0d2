"""Bias, cost-adjusted variance and CA-MSE of gradients, against a closed form; the search on a tiny run."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from semi_supervised_runs import make_run
from short_runs import make_trainer

from hf_msn import SequenceCompression, SequenceCompressionCallback, compare_gradients, find_compression
from hf_msn.cli.find_compression import _find_checkpoints
from hf_msn.cli.main import main
from hf_msn.trainers.find_compression import _gradients, _mini_batches

NUM_TOKENS, DIM, IMAGES = 8, 5, 4
MEAN = torch.linspace(0.1, 0.5, DIM, dtype=torch.float64)
SPREAD = 0.7


def gradient(generator: torch.Generator, num_kept: int) -> torch.Tensor:
    """Of 1/2 |w - x|^2 at w = 0, mean over a mini-batch of images.

    x is the sum over the kept tokens, of mean `MEAN` and independent with spread `SPREAD`, over the number of all.
    """
    weights = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    tokens = MEAN + SPREAD * torch.randn(IMAGES, NUM_TOKENS, DIM, generator=generator, dtype=torch.float64)
    kept = torch.rand(IMAGES, NUM_TOKENS, generator=generator).argsort(dim=1)[:, :num_kept]
    images = tokens.gather(1, kept[..., None].expand(-1, -1, DIM)).sum(dim=1) / NUM_TOKENS
    (found,) = torch.autograd.grad(0.5 * (weights - images).square().sum(dim=1).mean(), weights)
    return found


def closed_form(num_kept: int) -> tuple[float, float]:
    """Squared bias, as a share of the tokens is missing, and trace of the covariance."""
    bias2 = float(MEAN.square().sum()) * (1 - num_kept / NUM_TOKENS) ** 2
    return bias2, DIM * num_kept * SPREAD**2 / NUM_TOKENS**2 / IMAGES


@pytest.mark.parametrize("num_kept", [2, 6, 8])
def test_estimates_and_standard_errors_against_the_closed_form(num_kept):
    generator = torch.Generator().manual_seed(num_kept)
    cost, budget, repeats = num_kept / NUM_TOKENS, 2.0, 150
    found = []
    for _ in range(repeats):
        rows = [torch.stack([gradient(generator, kept) for _ in range(8)]) for kept in (num_kept, NUM_TOKENS)]
        estimate = compare_gradients(*rows, cost=cost, budget=budget)
        found.append(list(vars(estimate).values()))
    bias2, trace = closed_form(num_kept)
    expected = np.array([bias2, cost / budget * trace, bias2 + cost / budget * trace])
    values, errors = np.array(found)[:, ::2], np.array(found)[:, 1::2]
    spread = values.std(axis=0)
    assert np.all(np.abs(values.mean(axis=0) - expected) < 4 * spread / np.sqrt(repeats))
    ratio = np.sqrt((errors**2).mean(axis=0)) / spread
    assert np.all(ratio > 0.75) and np.all(ratio < 1.7)  # the jackknife is too large where there is no bias


def test_estimates_equal_the_loops_of_the_equation():
    torch.manual_seed(0)
    rows, plain = torch.randn(4, 3), torch.randn(5, 3) + 1
    traces = []
    for sample in (rows, plain):
        mean = sample.double().mean(dim=0)
        traces.append(sum(float((row - mean).square().sum()) for row in sample.double()) / (len(sample) - 1))
    distance = float((rows.double().mean(dim=0) - plain.double().mean(dim=0)).square().sum())
    found = compare_gradients(rows, plain, cost=0.5)
    assert found.bias2 == pytest.approx(distance - traces[0] / 4 - traces[1] / 5, rel=1e-10)
    assert found.ca_variance == pytest.approx(0.5 * traces[0], rel=1e-10)
    assert found.ca_mse == pytest.approx(found.bias2 + found.ca_variance, rel=1e-10)


@pytest.mark.parametrize(
    ("shapes", "settings", "message"),
    [
        (((2, 3), (4, 3)), {}, r"\(2, 3\)"),
        (((4, 3), (4, 2)), {}, r"\(4, 2\)"),
        (((4, 3), (4, 3)), {"cost": 0}, r"`cost`.*0"),
        (((4, 3), (4, 3)), {"budget": -1}, r"`budget`.*-1"),
    ],
)
def test_bad_samples_are_an_error(shapes, settings, message):
    with pytest.raises(ValueError, match=message):
        compare_gradients(*map(torch.zeros, shapes), **settings)


@pytest.mark.parametrize("method", ["msn", "suncet"])
def test_the_search_measures_each_strategy_and_leaves_the_run_as_it_was(tmp_path, method):
    make = make_trainer if method == "msn" else lambda folder, **settings: make_run(folder, method, **settings)
    trainer = make(tmp_path / "run", max_steps=4, save_strategy="no")
    trainer.state.max_steps = 4
    if method == "msn":
        trainer.view_sizes = lambda: {"image_size": 16, "focal_size": 8}
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    patch_size = trainer.model.config.patch_size
    found = find_compression(trainer, {0: None}, (0, 0.5), [patch_size, 2 * patch_size], batches=3)
    strategies = [(row["dropout"], row["patch_size"]) for row in found["measured"]]
    # half of the one patch of the smallest view is none
    assert strategies == [(0, patch_size), (0.5, patch_size), (0, 2 * patch_size)]
    costs = [row["cost"] for row in found["measured"]]
    assert costs[0] == 1 and max(costs[1:]) < 1
    best = min(found["measured"], key=lambda row: row["ca_mse"])
    assert found["stages"] == [{"progress": 0, "dropout": best["dropout"], "patch_size": best["patch_size"]}]
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.model.compression is None and trainer.args.on_collapse == "warn"
    SequenceCompressionCallback(trainer, found["stages"])


def test_gradients_are_those_of_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, model_fields={"mask_ratio": 0.0, "projection_batch_norm": False})
    trainer.state.max_steps = 4
    batches = [trainer._prepare_inputs(batch) for batch in trainer.get_train_dataloader()][:2]
    state = trainer.model.state_dict()
    rows, cost = _gradients(trainer, state, SequenceCompression(), batches, 0)
    assert cost == 1
    for row, batch in zip(rows, batches):
        trainer.model.zero_grad()
        trainer.model(**batch).loss.backward()
        expected = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
        torch.testing.assert_close(row, torch.cat(expected), rtol=1e-5, atol=1e-7)


def test_every_mini_batch_has_views_and_a_support_of_its_own(tmp_path):
    trainer = make_run(tmp_path, "paws", global_support_images_per_class=1)
    batches = _mini_batches(trainer, 7)  # of 5 in an epoch
    for name in ("support_pixel_values", "pixel_values"):
        views = [batch[name] for batch in batches]
        assert not any(torch.equal(first, second) for first, second in combinations(views, 2))


def test_bad_searches_are_an_error(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.state.max_steps = 4
    with pytest.raises(ValueError, match=r"`batches`.*2"):
        find_compression(trainer, {0: None}, batches=2)
    with pytest.raises(ValueError, match="progress 0"):
        find_compression(trainer, {0.5: None})
    with pytest.raises(ValueError, match=r"\[0.99\]"):
        find_compression(trainer, {0: None}, dropouts=[0.99])


@pytest.mark.slow
def test_the_command_writes_a_schedule_that_trains_and_a_picture(tmp_path):
    tiny = (
        "--config digits --hidden_size 16 --num_hidden_layers 1 --intermediate_size 16 --max_steps 8 --warmup_steps 1 "
    )
    tiny += "--disable_tqdm true --report_to none --dataloader_drop_last true"
    run, schedule = tmp_path / "run", tmp_path / "schedule.json"
    main(["pretrain", *tiny.split(), "--output_dir", str(run), "--save_strategy", "steps", "--save_steps", "0.25"])
    found, max_steps = _find_checkpoints(str(run))
    assert list(found) == [0, 0.25, 0.5, 0.75, 1] and max_steps == 8
    options = "--batches 3 --dropouts 0 0.5 --patch_sizes 2 4 --compress_targets"
    main(["find-compression", "--run", str(run), "--output", str(schedule), *options.split()])
    written = json.loads(schedule.read_text())
    assert len(written["measured"]) == 5 * 4 and written["stages"][0]["progress"] == 0
    assert all(np.isfinite(list(row.values())).all() for row in written["measured"])
    assert schedule.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    compressed = ["--output_dir", str(tmp_path / "compressed"), "--compression", str(schedule)]
    main(["pretrain", *tiny.split(), *compressed])
    with pytest.raises(ValueError, match=r"`run`.*compressed"):
        main(["find-compression", "--run", str(tmp_path / "compressed"), "--output", str(tmp_path / "other.json")])
    assert not (tmp_path / "other.json").exists()
