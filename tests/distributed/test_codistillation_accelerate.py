"""Codistillation of a causal language model in a loop of accelerate."""

import pytest
import torch
from accelerate import Accelerator
from launch import run_ranks
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_msn.distributed.codistillation import Codistillation


def language_model(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


def text(seed):
    ids = torch.randint(50, (4, 10), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(10) < 7, ids, -100)
    return {"input_ids": ids, "labels": labels}


def _train_with_accelerate(rank):
    found = {}
    for exchange, options in {
        "predictions": {"top_k": 8},
        "checkpoints": {"exchange_every": 2, "transfer_steps": 1, "copies_dtype": "bfloat16"},
    }.items():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
        model = language_model(0)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        unwrapped.load_state_dict(language_model(rank).state_dict())  # DDP has made them equal
        distances, steps = [], []
        with Codistillation(model, optimizer, exchange=exchange, alpha=2.0, **options) as codistillation:
            for step in range(24):
                batch = text(step if exchange == "predictions" else 2 * step + rank)
                mask = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
                with accelerator.accumulate(model):
                    output = model(**batch)
                    accelerator.backward(output.loss + codistillation.loss(output, batch, mask))
                    optimizer.step()
                    codistillation.step()
                    optimizer.zero_grad()
                steps.append(codistillation.steps)
                distances.append(codistillation.distance_of_predictions)
            # Of 12 updates the checkpoint after the 10th is in use.
            assert codistillation.staleness == (None if exchange == "predictions" else 2)
        found[exchange] = isinstance(model, DistributedDataParallel), steps, distances
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_an_accelerate_loop_with_a_causal_language_model_converges_to_agreement():
    for found in run_ranks(_train_with_accelerate, 2):
        for exchange, (is_wrapped, steps, distances) in found.items():
            assert is_wrapped and steps == [(step + 1) // 2 for step in range(24)]
            known = [distance for distance in distances if distance is not None]
            assert len(known) == (24 if exchange == "predictions" else 18)
            assert sum(known[-4:]) < 0.8 * sum(known[:4])
