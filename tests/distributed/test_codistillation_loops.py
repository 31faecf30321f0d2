"""Codistillation in loops as people write them: accelerate, causal language models, losses over ranks."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from launch import run_ranks
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_msn.distributed.codistillation import Codistillation
from hf_msn.distributed.collectives import all_gather_cat


def language_model(seed, dropout=0.1):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    # Far apart in the beginning, not all near to uniform.
    config = GPT2Config(**sizes, **dropouts, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


def text(seed, pad=3):
    ids = torch.randint(50, (4, 10), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, -pad:] = -100
    return {"input_ids": ids, "labels": labels}


def mask_of(labels):
    return torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))


def _train_with_accelerate(rank, exchange):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(
        *(lambda m: (m, torch.optim.AdamW(m.parameters(), lr=0.01)))(language_model(0))
    )
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    unwrapped.load_state_dict(language_model(rank).state_dict())  # DDP had made them equal
    options = {"top_k": 8} if exchange == "predictions" else {"exchange_every": 2, "transfer_steps": 1}
    distances, steps, fidelity = [], [], []
    with Codistillation(model, optimizer, exchange=exchange, alpha=2.0, **options) as codistillation:
        for step in range(24):
            batch = text(step if exchange == "predictions" else 2 * step + rank)
            with accelerator.accumulate(model):
                output = model(**batch)
                loss = output.loss + codistillation.loss(output, batch, mask_of(batch["labels"]))
                accelerator.backward(loss)
                optimizer.step()
                codistillation.step()
                optimizer.zero_grad()
            steps.append(codistillation.steps)
            distances.append(codistillation.distance_of_predictions)
        if exchange == "checkpoints":
            # 12 updates: in use is what the other had after the 10th.
            assert codistillation.staleness == 2
            copies = codistillation._peers._copies
            with copies.of(1 - rank, text(0)) as (copy, batch):
                assert copy is not unwrapped
                assert copy.forward.__self__ is copy
                fidelity = [not copy.training, copy(**batch).logits.dtype]
    return isinstance(model, DistributedDataParallel), steps, distances, fidelity


@pytest.mark.distributed
@pytest.mark.parametrize("exchange", ["predictions", "checkpoints"])
def test_an_accelerate_loop_with_a_causal_language_model_comes_to_agree(exchange):
    results = run_ranks(_train_with_accelerate, 2, exchange)
    for wrapped, steps, distances, fidelity in results:
        assert wrapped
        assert steps == [(step + 1) // 2 for step in range(24)]
        known = [distance for distance in distances if distance is not None]
        assert len(known) == (24 if exchange == "predictions" else 18)
        assert sum(known[-4:]) < 0.8 * sum(known[:4])
        assert fidelity in ([], [True, torch.float32])


def _copies_of_a_language_model(rank, dtype):
    model = language_model(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"exchange_every": 1, "transfer_steps": 0, "copies_dtype": dtype}
    with Codistillation(model, optimizer, exchange="checkpoints", **options) as codistillation:
        for step in range(2):
            batch = text(rank + 10 * step)
            output = model(**batch)
            loss = codistillation.loss(output, batch, mask_of(batch["labels"]))
            (output.loss + loss).backward()
            optimizer.step()
            codistillation.step()
            optimizer.zero_grad()
    # What the last loss was asked of: a fresh model with the other's parameters after its first update.
    return loss.item(), output.logits.detach(), {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.distributed
def test_copies_in_bfloat16_teach_nearly_what_whole_ones_do():
    whole, half = (run_ranks(_copies_of_a_language_model, 2, dtype) for dtype in (None, "bfloat16"))
    for (loss, *_), (near, *_) in zip(whole, half):
        assert loss > 0.01
        assert near != loss
        assert near == pytest.approx(loss, rel=0.05)


class OverRanks(torch.nn.Module):
    """Its forward pass gathers what the ranks have: those of the replica only, also in the copies."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        gathered = all_gather_cat(self.linear(x))
        return {"logits": self.linear(x) - gathered.mean(0), "loss": gathered.square().mean(), "rows": len(gathered)}


def _gather_in_forward(rank):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "inner"))
    model = OverRanks(rank // 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = []

    def forward(copy, batch):
        output = copy(**batch)
        rows.append(output["rows"])
        return output

    options = {"exchange_every": 2, "forward": forward, "group": mesh["replica"].get_group()}
    inner = mesh["inner"].get_group()
    with Codistillation(model, optimizer, exchange="checkpoints", inner_group=inner, **options) as codistillation:
        # The two replicas are never at the same step: a gathering over all ranks would mix them up or hang.
        for step in range(6 if rank < 2 else 7):
            batch = {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + rank))}
            output = model(**batch)
            rows.append(output["rows"])
            (output["loss"] + codistillation.loss(output, batch)).backward()
            optimizer.step()
            codistillation.step()
            optimizer.zero_grad()
    return rows, model.linear.weight.detach().clone()


@pytest.mark.distributed
def test_what_a_forward_pass_gathers_stays_inside_of_the_replica_in_copies_too():
    results = run_ranks(_gather_in_forward, 4)
    for rank, (rows, weight) in enumerate(results):
        assert rows == [10] * (6 + 4 if rank < 2 else 7 + 5)
        assert torch.equal(weight, results[rank // 2 * 2][1])
    assert not torch.equal(results[0][1], results[2][1])
