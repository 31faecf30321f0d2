"""scripts/benchmarks/step.py, and that its plain step does the work of ours."""

import json
from functools import partial

import plain_step
import pytest
import step
import torch
from tiny import tiny_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from hf_msn import MSNConfig, MSNTrainer, MSNTrainingArguments

TINY = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --patch_size 8 --image_size 32 --focal_size 16 "
    "--focal_views 2 --batch_size 4 --steps 3 --warmup_steps 1 --threads 1 --cpu"
).split()


@pytest.mark.parametrize("anchor_views", [1, 2])
def test_the_first_losses_are_equal(anchor_views):
    model, batch = tiny_model(mask_ratio=0.0, me_max_weight=5.0), tiny_batch(anchor_views=anchor_views)
    assert plain_step.PlainStep(model).loss(batch, mask_ratio=0.0).item() == pytest.approx(
        model(**batch).loss.item(), rel=1e-5
    )


def test_five_steps_of_both_have_equal_losses(tmp_path):
    batch = tiny_batch()
    arguments = MSNTrainingArguments(
        str(tmp_path),
        max_steps=5,
        warmup_epochs=0,
        per_device_train_batch_size=4,
        ema_momentum=0.5,
        max_grad_norm=0.3,  # below what the gradients have, so that clipping shows
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = MSNTrainer(
        tiny_model(mask_ratio=0.0), arguments, train_dataset=range(20), data_collator=lambda rows: batch
    )
    plain, losses = plain_step.PlainStep(trainer.model), []

    class Plainly(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            losses.append(
                plain.step(
                    batch,
                    learning_rate=trainer.lr_scheduler.get_last_lr()[0],
                    weight_decay=trainer.weight_decay_now(),
                    momentum=trainer.ema_momentum_now(),
                    max_grad_norm=args.max_grad_norm,
                )
            )

    trainer.add_callback(Plainly())
    trainer.train()
    ours = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(ours, rel=1e-4)
    assert abs(losses[4] - losses[0]) > 0.01


def test_the_plain_mask_keeps_the_same_patches_of_all_images():
    model = tiny_model(mask_ratio=0.75)  # keeps 4 of 16
    plain, seen = plain_step.PlainStep(model), []
    plain.online.encoder.blocks[0].register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    patches = tiny_batch()
    patches["anchor_pixel_values"] = patches["anchor_pixel_values"][:1].expand(4, -1, -1, -1, -1)
    plain.loss(patches, mask_ratio=0.75)
    anchors, focals = seen
    assert anchors.shape == (4, 5, 32) and focals.shape == (8, 5, 32)
    assert torch.allclose(anchors[0], anchors[3])


@pytest.mark.slow
def test_table_and_json_have_both_steps_at_both_precisions(run, tmp_path, monkeypatch):
    output = tmp_path / "new" / "steps.json"
    heads = {"projection_hidden_dim": 32, "projection_dim": 16, "num_prototypes": 16}
    monkeypatch.setattr(step, "MSNConfig", partial(MSNConfig, **heads))
    monkeypatch.setattr(step, "product_rates", partial(step.product_rates, repeats=1))
    printed = run(step, *TINY, "--profile", "--peak_tflops", 0.5, "--gradient_checkpointing", "--output", output)
    results = json.loads(output.read_text())
    for precision in ("fp32", "bf16"):
        entry = results["results"][precision]
        assert len(entry["seconds"]["hf_msn"]) == len(entry["seconds"]["plain"]) == 3  # the profiled step is not timed
        rates = sorted(4 / seconds for seconds in entry["seconds"]["hf_msn"])
        assert entry["hf_msn"]["median"] == rates[1] and entry["hf_msn"]["range"] == [rates[0], rates[2]]
        pairs = sorted(b / a for a, b in zip(entry["seconds"]["hf_msn"], entry["seconds"]["plain"]))
        assert entry["ratio"]["median"] == pairs[1]
        assert entry["tflops_per_rank"] == pytest.approx(rates[1] * entry["gflop"] / 1e3)
        row = next(line for line in printed.splitlines() if line.startswith(f"| {precision}"))
        assert f"{rates[1]:.2f} (" in row and f"{pairs[1]:.2f} (" in row
        assert f"{entry['tflops_per_rank'] / 0.5:.1%}" in row
        shares = [operator["share"] for operator in entry["profile"]]
        assert shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1.0
        assert all(f"{share:.1%}" in printed for share in shares)


def test_operations_of_an_image():
    model, batch = tiny_model(mask_ratio=0.0), tiny_batch(batch_size=4)
    flops = step.flops_per_image(model, batch)
    half = step.flops_per_image(model, {name: views[:2] for name, views in batch.items()})
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert flops == half == pytest.approx(counter.get_total_flops() / 4, rel=1e-6)


def test_steps_that_do_other_work_are_not_compared():
    model, batch = tiny_model(), tiny_batch()
    plain = plain_step.PlainStep(model)
    step.check_same_loss(model, plain, batch)
    assert model.config.mask_ratio == 0.25
    with torch.no_grad():
        plain.online.encoder.blocks[0].fc1.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="1e-4"):
        step.check_same_loss(model, plain, batch)


def test_models_have_the_sizes_of_the_paper():
    large = step.BenchmarkArguments(model="l7")
    assert (large.hidden_size, large.num_hidden_layers, large.patch_size, large.mask_ratio) == (1024, 24, 7, 0.7)
    assert large.focal_size == 98
    assert step.BenchmarkArguments(model="l7", mask_ratio=0.0).mask_ratio == 0.0
