"""Short runs of MSNTrainer on random views that depend on row and epoch alone."""

import torch
from tiny import tiny_model
from transformers import TrainerCallback

from hf_msn import MSNTrainer, MSNTrainingArguments


class RandomViews(torch.utils.data.Dataset):
    """Views of `num_images` random images: others in each epoch, the same in each run."""

    def __init__(self, num_images: int = 20):
        self.num_images, self.epoch = num_images, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self):
        return self.num_images

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(1000 * self.epoch + row)
        return {
            "pixel_values": torch.randn(3, 16, 16, generator=generator),
            "anchor_pixel_values": torch.randn(1, 3, 16, 16, generator=generator),
            "focal_pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        }


class StopAt(TrainerCallback):
    """End the training after a step, as a user or a cluster does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


SHORT = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "warmup_steps": 2,
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def make_trainer(
    output_dir, dataset=None, callbacks=None, model_fields=None, eval_dataset=None, **arguments
) -> MSNTrainer:
    """Return a trainer of a tiny model: 4 images per batch, 8 steps, a checkpoint every 3."""
    return MSNTrainer(
        tiny_model(**(model_fields or {})),
        MSNTrainingArguments(str(output_dir), **{**SHORT, "save_steps": 3, **arguments}),
        train_dataset=RandomViews() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def end_workers(trainer) -> None:
    """End persistent workers. Where a garbage collection ends them, torch waits 5 seconds for each."""
    for loader in trainer.accelerator._dataloaders:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


def logged(trainer, name: str = "loss") -> dict[int, float]:
    """Return a logged value by step."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


def assert_same_weights(model, expected) -> None:
    """Compare bitwise, buffers included."""
    state, expected = model.state_dict(), expected.state_dict()
    differing = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not differing


def whole_and_resumed(make, folder, step: int, **settings) -> list:
    """Train, and again from the checkpoint of `step`, with the same end; return both trainers."""
    trainers = [
        make(folder / "whole", **settings, save_strategy="steps", save_steps=step),
        make(folder / "resumed", **settings, save_strategy="no"),
    ]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{step}"))
    assert_same_weights(trainers[1].model, trainers[0].model)
    losses = logged(trainers[0])
    assert logged(trainers[1]) == losses and len(losses) == trainers[1].state.global_step == trainers[0].args.max_steps
    return trainers
