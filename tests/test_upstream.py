"""Private and semi-private names of other libraries that hf_msn relies on, with what it counts on.

A release that breaks one of them fails here, by name. The last tests hold the lists complete.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

ROOT = Path(__file__).parents[1]

# Methods of Trainer that are overridden or called, beyond its documented ones: their parameters.
TRAINER = {
    "_clip_grad_norm": "model",
    "_get_dataloader": "dataset description batch_size sampler_fn is_training dataloader_key",
    "_get_grad_norm": "model grad_norm",
    "_get_output_dir": "trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_prepare_inputs": "inputs",
    "_push_from_checkpoint": "checkpoint_folder",
    "_run_epoch": "**",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_rng_state": "output_dir",
    "create_scheduler": "num_training_steps optimizer",
    "get_batch_samples": "epoch_iterator num_batches device",
    "get_decay_parameter_names": "model",
    "get_optimizer_cls_and_kwargs": "args model",
    "init_hf_repo": "token",
    "log": "logs start_time",
    "training_step": "model inputs num_items_in_batch",
}

# "module: names" that are imported from modules that the libraries' documentation does not list.
NAMES = """
"""


def imports_from_submodules() -> dict[str, set[str]]:
    """Return the names that hf_msn imports from modules below the top of transformers, accelerate, datasets, ..."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "hf_msn").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                library, _, below = node.module.partition(".")
                if below and library in {"transformers", "accelerate", "datasets", "huggingface_hub", "timm"}:
                    found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


if __name__ == "__main__":
    for m, n in sorted(imports_from_submodules().items()): print(m + ":", *sorted(n))
    names=set()
    for file in sorted((ROOT / "hf_msn").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            n = getattr(node,"attr",None) or (node.name if isinstance(node,ast.FunctionDef) else None)
            if n and n.startswith("_") and not n.startswith("__") and hasattr(Trainer,n): names.add(n)
    for n in sorted(names|set(TRAINER)): print(n, list(inspect.signature(getattr(Trainer,n)).parameters) if hasattr(Trainer,n) else "MISSING")
