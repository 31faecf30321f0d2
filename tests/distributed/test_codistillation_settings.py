"""The settings of codistillation, and what it refuses to train."""

import pytest
import torch

from hf_msn.distributed.codistillation import Codistillation
from hf_msn.distributed.local_sgd import LocalSGD


def make(**options):
    model = torch.nn.Linear(3, 2)
    return Codistillation(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"exchange": "gradients"}, r"exchange.*'predictions' or 'checkpoints'.*'gradients'"),
        ({"exchange": ["predictions"]}, "exchange"),
        ({"distance": "cosine"}, "distance.*'kl'.*'mse'.*'cosine'"),
        ({"alpha": -0.5}, r"alpha.*>= 0.*-0.5"),
        ({"alpha": float("nan")}, "alpha.*nan"),
        ({"temperature": 0.0}, r"temperature.*> 0.*0.0"),
        ({"temperature": "warm"}, "temperature.*'warm'"),
        ({"top_k": 0}, "top_k.*>= 1.*0"),
        ({"top_k": 5, "distance": "mse"}, "top_k.*'mse'"),
        ({"top_k": 5, "exchange": "checkpoints"}, "top_k.*checkpoints.*5"),
        ({"wire_dtype": "bfloat16", "exchange": "checkpoints"}, "wire_dtype.*copies_dtype"),
        ({"wire_dtype": "int8"}, "wire_dtype.*'int8'"),
        ({"exchange_every": 0}, "exchange_every.*>= 1.*0"),
        ({"transfer_steps": -1}, "transfer_steps.*>= 0.*-1"),
        ({"transfer_steps": 11, "exchange_every": 10}, "transfer_steps.*11.*exchange_every=10"),
        ({"ramp_steps": 1.5}, "ramp_steps.*1.5"),
        ({"burn_in_steps": -1}, "burn_in_steps.*-1"),
        ({"check_every": 0}, "check_every.*0"),
        ({"copies_dtype": "float16"}, "copies_dtype.*'float16'"),
        ({"copies_device": "cuda"}, "copies_device.*'cpu'.*'cuda'"),
        ({"on_lost_replica": "ignore"}, "on_lost_replica.*'ignore'"),
        ({"timeout_seconds": 0}, "timeout_seconds.*> 0"),
    ],
)
def test_settings_outside_their_rules_are_refused_with_value_and_rule(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_alpha_is_zero_in_the_burn_in_then_rises_then_stays():
    codistillation = make(alpha=2.0, burn_in_steps=3, ramp_steps=4)
    assert [codistillation.alpha_at(k) for k in range(9)] == [0.0] * 4 + [0.5, 1.0, 1.5, 2.0, 2.0]
    codistillation = make(alpha=lambda step: step / 10, burn_in_steps=2)
    assert [codistillation.alpha_at(k) for k in range(4)] == [0.0, 0.0, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"alpha.*-1"):
        make(alpha=lambda step: -1.0).alpha_at(0)


def test_a_sharded_model_is_refused():
    class FSDPModule(torch.nn.Linear):
        pass

    model = FSDPModule(3, 2)
    with pytest.raises(TypeError, match="whole model on every rank"):
        Codistillation(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_one_replica_trains_as_without_it_with_a_warning():
    codistillation = make()
    with pytest.warns(UserWarning, match="one replica only"), codistillation:
        output = codistillation.model(torch.ones(2, 3))
        loss = codistillation.loss(output, None)
        assert (loss.item(), loss.requires_grad) == (0.0, False)
        codistillation.step()
        assert codistillation.staleness is None
        assert codistillation.distance_of_predictions is None
        with pytest.raises(ValueError, match=r"takes one sync object at a time"):
            Codistillation(codistillation.model, codistillation.optimizer).start()
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"takes one sync object at a time"):
            LocalSGD(codistillation.model, codistillation.optimizer).start()
        with pytest.raises(ValueError, match="must have `logits`"):
            codistillation.loss({"hidden": output}, None)
        with pytest.raises(ValueError, match="floating-point logits"):
            codistillation.loss(output.argmax(-1), None)
        state = codistillation.state_dict()
    with pytest.raises(RuntimeError, match="must be entered"):
        codistillation.step()
    with pytest.raises(ValueError, match=r"'checkpoints'.*is of.*'predictions'"):
        make(exchange="checkpoints").load_state_dict(state)
