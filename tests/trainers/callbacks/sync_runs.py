"""Short runs of plain Trainers on tiny models in float64, and callbacks that observe them."""

import shutil
from functools import partial

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_msn import LocalUpdateTrainerMixin


def image_rows(count: int = 32) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator).double(), "labels": row % 3} for row in range(count)
    ]


def text_rows(count: int = 32) -> list[dict]:
    """Return sequences of 6 tokens, of which 1 to 5 have a label."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in range(count):
        tokens = torch.randint(0, 11, (6,), generator=generator)
        place = torch.arange(6)
        counts = (place > 0) & (place < row % 5 + 2)  # nothing predicts the first token
        rows.append({"input_ids": tokens, "labels": torch.where(counts, tokens, -100)})
    return rows


def image_model() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config).double()


def text_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **rates
    )
    return GPT2LMHeadModel(config).double()


KINDS = {"image": (image_model, image_rows), "text": (text_model, text_rows)}


class LocalTrainer(LocalUpdateTrainerMixin, Trainer):
    pass


def make_trainer(
    folder, kind: str = "image", model=None, callbacks=None, trainer_class=Trainer, **arguments
) -> Trainer:
    """Return a trainer with AdamW: 8 updates of 4 rows per rank, a learning rate that falls linearly to 0."""
    make_model, make_rows = KINDS[kind]
    arguments = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **arguments,
    }
    rows = make_rows()
    return trainer_class(
        model or make_model(),
        TrainingArguments(str(folder), **arguments),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=callbacks,
    )


def train_whole_and_resumed(make, folder, step: int) -> list[Trainer]:
    """Train with `make(folder)`, and once more from the checkpoint of `step`, as if killed after it. On every rank."""
    trainers = [make(f"{folder}_whole"), make(f"{folder}_resumed")]
    trainers[0].train()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.copytree(f"{folder}_whole/checkpoint-{step}", f"{folder}_resumed/checkpoint-{step}")
    torch.distributed.barrier()
    trainers[1].train(resume_from_checkpoint=True)
    return trainers


def saved_states(folder, rank: int) -> list[dict]:
    """Return the last states of a rank in both runs of [`train_whole_and_resumed`]."""
    folders = [f"{folder}_{run}/checkpoint-8" for run in ("whole", "resumed")]
    return [torch.load(f"{last}/sync_state_{rank}.pt", weights_only=True) for last in folders]


make_local_trainer = partial(make_trainer, trainer_class=LocalTrainer)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Snapshots(TrainerCallback):
    """Collects (event, step, weights)."""

    def __init__(self):
        self.taken = []

    def _take(self, event, state, model):
        self.taken.append((event, state.global_step, weights(model)))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._take("step", state, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self._take("evaluate", state, model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._take("save", state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._take("end", state, model)


def watch_batches(trainer) -> list[dict]:
    """Return the list to which the trainer adds the inputs of every micro-batch."""
    seen, training_step = [], trainer.training_step

    def watched(model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items()})
        return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = watched
    return seen


def logged(trainer, name: str) -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
