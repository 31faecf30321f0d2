"""scripts/benchmarks/peers.py, with our own step under another name as the peer."""

import json
import math
from dataclasses import replace

import peers
import pytest
import torch

TINY = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --patch_size 8 --image_size 32 --focal_size 16 "
    "--num_prototypes 16 --batch_size 4 --steps 3 --warmup_steps 1 --threads 1 --images 3 --cpu"
).split()


@pytest.fixture
def twin(monkeypatch):
    def side(args, focal_views, device):
        return None if focal_views else replace(peers.our_side(args, focal_views, device), name="twin")

    def absent(args, focal_views, device):
        raise ImportError("No module named 'absent'")

    monkeypatch.setattr(peers, "SIDES", {"lightly": side, "stable_pretraining": absent})


@pytest.mark.slow
def test_tables_and_json_hold_ours_the_peer_and_the_absent(run, twin, tmp_path):
    output = tmp_path / "peers.json"
    printed = run(peers, *TINY, "--focal_views", 2, 0, "--precision", "fp32", "--output", output)
    steps = json.loads(output.read_text())["steps"]
    assert list(steps["2 focal views, fp32"]) == ["hf_msn"] and "takes no focal views" in printed
    assert list(steps["0 focal views, fp32"]) == ["hf_msn", "twin"]
    assert "No module named 'absent'" in printed
    assert (
        peers.markdown_table(["x"], [[steps["0 focal views, fp32"]["twin"]["ratio"]]]).split("\n")[2][2:8] in printed
    )


def test_ratios_are_of_the_same_round():
    found = peers.compare({"hf_msn": [1.0, 2.0, 4.0], "twin": [2.0, 6.0, 4.0]}, 8)
    assert found["twin"]["ratio"]["median"] == 2.0 and found["twin"]["ratio"]["range"] == [1.0, 3.0]
    assert found["hf_msn"]["images_per_second"]["median"] == 4.0


@pytest.mark.slow
def test_our_step_is_forward_backward_clipping_adamw_and_average():
    args = peers.PeerArguments(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32, focal_size=16,
        num_prototypes=16, batch_size=4, focal_views=2,
    )  # fmt: skip
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        sides.append(peers.our_side(args, 2, torch.device("cpu")))
    ours, slow = sides
    batch = peers.random_views(args, 0)
    loss = ours.step(batch, "fp32")
    expected = slow.loss(batch)
    expected.backward()
    norm = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in slow.clipped))
    for parameter in slow.clipped:
        parameter.grad.mul_(min(1.0, 3.0 / (norm + 1e-6)))
    slow.optimizer.step()
    slow.model.update_target(peers.MOMENTUM)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours.model.parameters(), slow.model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_models_of_other_sizes_are_not_compared():
    side = peers.Side("hf_msn", torch.nn.Linear(4, 4), None, None, None)
    with pytest.raises(RuntimeError, match="large"):
        peers.check_equal_size([side, replace(side, name="large", model=torch.nn.Linear(4, 5))])
