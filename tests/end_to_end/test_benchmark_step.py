"""scripts/benchmark_step.py, and that its plain step does the work of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from hf_msn import MSNTrainer, MSNTrainingArguments

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --patch_size 8 --image_size 32 --focal_size 16 "
    "--focal_views 2 --batch_size 4 --steps 3 --warmup_steps 1 --threads 1 --cpu"
).split()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_step

    return benchmark_step


@pytest.fixture
def plain_step(script):
    import plain_step

    return plain_step.PlainStep


@pytest.mark.parametrize("anchor_views", [1, 2])
def test_the_first_losses_are_equal(plain_step, anchor_views):
    model, batch = tiny_model(mask_ratio=0.0, me_max_weight=5.0), tiny_batch(anchor_views=anchor_views)
    assert plain_step(model).loss(batch, mask_ratio=0.0).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_five_steps_of_both_have_equal_losses(plain_step, tmp_path):
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
    plain, losses = plain_step(trainer.model), []

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


def test_the_plain_mask_keeps_the_same_patches_of_all_images(plain_step):
    model = tiny_model(mask_ratio=0.75)  # keeps 4 of 16
    plain, seen = plain_step(model), []
    plain.online.encoder.blocks[0].register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    patches = tiny_batch()
    patches["anchor_pixel_values"] = patches["anchor_pixel_values"][:1].expand(4, -1, -1, -1, -1)
    plain.loss(patches, mask_ratio=0.75)
    anchors, focals = seen
    assert anchors.shape == (4, 5, 32) and focals.shape == (8, 5, 32)
    assert torch.allclose(anchors[0], anchors[3])


def test_table_and_json_have_both_steps_at_both_precisions(script, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "steps.json"
    monkeypatch.setattr(sys, "argv", ["benchmark_step.py", *TINY, "--output", str(output)])
    script.main()
    printed = capsys.readouterr().out
    assert "1 target + 1 anchor + 2 focal views of 32 and 16 px, 15% dropped, batch 4 x 1 rank" in printed
    results = json.loads(output.read_text())
    for precision in ("fp32", "bf16"):
        entry = results["results"][precision]
        assert len(entry["seconds"]["hf_msn"]) == len(entry["seconds"]["plain"]) == 3
        rates = sorted(4 / seconds for seconds in entry["seconds"]["hf_msn"])
        assert entry["hf_msn"]["median"] == rates[1] and entry["hf_msn"]["range"] == [rates[0], rates[2]]
        pairs = sorted(b / a for a, b in zip(entry["seconds"]["hf_msn"], entry["seconds"]["plain"]))
        assert entry["ratio"]["median"] == pairs[1]
        row = next(line for line in printed.splitlines() if line.startswith(precision))
        assert f"{rates[1]:.2f} (" in row and f"{pairs[1]:.2f} (" in row


def test_profile_operations_and_the_part_of_the_peak(script, tmp_path, monkeypatch, capsys):
    output = tmp_path / "steps.json"
    asked = ["--precision", "fp32", "--no_plain", "--profile", "--peak_tflops", "0.5", "--gradient_checkpointing"]
    monkeypatch.setattr(sys, "argv", ["benchmark_step.py", *TINY, *asked, "--output", str(output)])
    script.main()
    printed = capsys.readouterr().out
    entry = json.loads(output.read_text())["results"]["fp32"]
    assert len(entry["seconds"]["hf_msn"]) == 3, "the step of the profile is not among the timed"
    reached = entry["hf_msn"]["median"] * entry["gflop"] / 1e3
    assert entry["tflops_a_rank"] == pytest.approx(reached)
    assert f"{entry['gflop']:.1f} GFLOP an image, {reached:.3f} TFLOP/s a rank, {reached / 0.5:.0%} of 0.5" in printed
    shares = [operator["share"] for operator in entry["profile"]]
    assert shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1.0
    assert {"aten::addmm", "aten::mm"} <= {operator["name"] for operator in entry["profile"]}
    assert all(f"{operator['share']:.1%}" in printed for operator in entry["profile"])


def test_operations_of_an_image(script):
    import step_costs

    model, batch = tiny_model(mask_ratio=0.0), tiny_batch(batch_size=4)
    flops = step_costs.flops_an_image(model, batch)
    half = step_costs.flops_an_image(model, {name: views[:2] for name, views in batch.items()})
    model.zero_grad()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert flops == half == pytest.approx(counter.get_total_flops() / 4, rel=1e-6)


def test_steps_that_do_other_work_are_not_compared(script, plain_step):
    model, batch = tiny_model(), tiny_batch()
    plain = plain_step(model)
    script.check_same_loss(model, plain, batch)
    assert model.config.mask_ratio == 0.25
    with torch.no_grad():
        plain.online.encoder.blocks[0].fc1.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="they must agree to 1e-4"):
        script.check_same_loss(model, plain, batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": ["fp8"]}, "`precision` is of fp32 and bf16, but is"),
        ({"steps": 0}, "`steps` must be >= 1, but is 0"),
        ({"batch_size": 1}, "`batch_size` must be >= 2, but is 1"),
    ],
)
def test_bad_arguments_are_errors(script, arguments, message):
    with pytest.raises(ValueError, match=message):
        script.BenchmarkArguments(**arguments)


def test_models_have_the_sizes_of_the_paper(script):
    large = script.BenchmarkArguments(model="l7")
    assert (large.hidden_size, large.num_hidden_layers, large.patch_size, large.mask_ratio) == (1024, 24, 7, 0.7)
    assert large.focal_size == 98
    assert script.BenchmarkArguments(model="l7", mask_ratio=0.0).mask_ratio == 0.0


@pytest.mark.distributed
def test_two_ranks_make_one_table(tmp_path):
    output = tmp_path / "steps.json"
    command = [sys.executable, str(SCRIPTS / "benchmark_step.py"), *TINY, "--precision", "fp32", "--world_size", "2"]
    done = subprocess.run(
        [*command, "--output", str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("batch 4 x 2 ranks") == 1
    assert json.loads(output.read_text())["machine"]["ranks"] == 2
