"""scripts/benchmarks/accuracy.py on a few digits."""

import json

import accuracy
import peer_methods
import pytest
import torch

from hf_msn import load_images

VARIANT = "hidden_size=16 num_hidden_layers=1 projection_hidden_dim=16 projection_dim=8 per_device_train_batch_size=8"


@pytest.fixture
def few_digits(monkeypatch):
    parts = load_images("digits").select(range(60)), load_images("digits", split="test").select(range(40))
    monkeypatch.setattr(accuracy, "load", lambda name: parts)


class Mirror(peer_methods.PeerModel):
    """A peer that needs no package: two views shall be equal."""

    def build(self):
        self.projection_head = self.target_projection_head = None

    def compare(self, target, anchor):
        features = self._features(self.encoder, [target, anchor])
        first, second = features.chunk(2)
        return (first - second).square().mean(), features, features


@pytest.mark.slow
def test_all_methods_have_the_same_draws(run, few_digits, monkeypatch, tmp_path):
    monkeypatch.setitem(peer_methods.PEERS, "mirror", Mirror)
    arguments = (
        f"--seeds 2 --max_steps 3 --images_per_class 2 --methods msn paws mirror --output {tmp_path / 'a.json'}"
    )
    shown = run(accuracy, *arguments.split(), "--variants", VARIANT)
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [result["method"] for result in results] == ["msn", "paws", "mirror"]
    assert all(seed["updates"] == 3 for result in results for seed in result["runs"])
    pixels = [
        [seed["low_shot/2_per_class/pixels_top1"] for seed in result["runs"]] for result in (results[0], results[2])
    ]
    assert pixels[0] == pixels[1] and (tmp_path / "a.png").exists()
    assert shown.count("| raw pixels") == 3


@pytest.mark.slow
def test_seconds_become_updates(run, few_digits, monkeypatch, tmp_path):
    """With 40 updates in 4 s and 8 in 0.8 s, 1.55 s are 15 updates; the runs of all seeds have as many."""
    lengths = []

    def timed(trainer):
        lengths.append(trainer.args.max_steps)
        return trainer.args.max_steps / 10

    monkeypatch.setattr(accuracy, "timed", timed)
    arguments = "--seeds 2 --max_seconds 1.55 --images_per_class 1 --output".split()
    run(accuracy, *arguments, tmp_path / "a.json", "--variants", VARIANT)
    [result] = json.loads((tmp_path / "a.json").read_text())["results"]
    assert lengths == [8, 40] and [seed["updates"] for seed in result["runs"]] == [15, 15]


@pytest.mark.parametrize("arguments", [{"methods": ["dino"]}, {"seeds": 1}, {"max_seconds": 0}])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        accuracy.BenchmarkArguments(**arguments)


@pytest.mark.parametrize("name", list(peer_methods.PEERS))
def test_a_peer_trains_our_encoder(name):
    """Its loss has a gradient for the encoder, and its target moves."""
    pytest.importorskip(name.split(":")[0])
    from hf_msn import MSNConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"image_size": 8, "patch_size": 4, "projection_hidden_dim": 16, "projection_dim": 8, "num_prototypes": 8}
    model = peer_methods.PEERS[name](MSNConfig(**sizes, mask_ratio=0.5)).train()
    output = model(torch.randn(4, 3, 8, 8), torch.randn(4, 1, 3, 8, 8))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.encoder.layers.parameters())
    before = [parameter.clone() for parameter in model.evaluation_encoder.parameters()]
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.encoder.parameters()) + 1, model.encoder.parameters()
    )
    model.update_target(0.5)
    moved = [not old.equal(new) for old, new in zip(before, model.evaluation_encoder.parameters())]
    assert all(moved)
