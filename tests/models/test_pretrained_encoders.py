"""New encoders and encoders of checkpoints: timm's initial weights, PAWS's networks, errors."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_semi_supervised import HEADS, RESNET18, RESNETV2, VIT, tiny_paws, tiny_suncet
from transformers import BertConfig, BertModel, ViTMSNModel

from hf_msn import MSNConfig, MSNForPreTraining, PAWSConfig, PAWSForPreTraining, SuNCEtForPreTraining

ROPE = {
    "timm_model": "vit_small_patch16_rope_224",
    "timm_options": {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "img_size": 16,
        "patch_size": 4,
        "dynamic_img_size": True,
    },
}
BLUR = {"timm_model": "resnetblur18", "timm_options": RESNET18["timm_options"]}
COAT = {  # its blocks share the convolutions of their positions
    "timm_model": "coat_lite_tiny",
    "timm_options": {"embed_dims": [16, 16, 24, 32], "serial_depths": [2, 1, 1, 1], "img_size": 32},
}
NETWORKS = {
    "coat": COAT,
    "resnet18": RESNET18,
    "resnetv2": {**RESNETV2, "small_image_stem": False},
    "rope": ROPE,
    "blur": BLUR,
}


def images(num: int = 2) -> torch.Tensor:
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def new_paws(seed: int = 0, **fields) -> PAWSForPreTraining:
    torch.manual_seed(seed)
    return PAWSForPreTraining(PAWSConfig(**HEADS, **fields)).eval()


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_of_timm_are_as_timm_draws_them(network):
    fields = NETWORKS[network]
    model = new_paws(**fields)
    torch.manual_seed(0)
    start = {} if network in ("coat", "rope") else {"zero_init_last": False}  # as in the authors' code
    reference = timm.create_model(fields["timm_model"], num_classes=0, **fields["timm_options"], **start).eval()
    state = model.encoder.state_dict()
    assert state.keys() == reference.state_dict().keys()
    assert [name for name, wanted in reference.state_dict().items() if not torch.equal(state[name], wanted)] == []
    assert torch.equal(model.encoder(images()), reference(images()))


@pytest.mark.parametrize(
    "network", [RESNET18, RESNETV2, {"timm_model": "paws_resnet", "timm_options": {"layers": [1, 1, 1, 1]}}]
)
def test_residual_blocks_do_not_start_at_0(network):
    parameters = dict(new_paws(**network).encoder.named_parameters())
    assert all(p.any() for name, p in parameters.items() if name.endswith("weight"))
    assert all((p == 1).all() for name, p in parameters.items() if p.ndim == 1 and name.endswith("weight"))
    zero = {**network, "timm_options": {**network["timm_options"], "zero_init_last": True}}
    assert not all(p.any() for name, p in new_paws(**zero).encoder.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("network", ["coat", "rope", "blur"])
def test_tables_that_no_checkpoint_holds_are_made_again(network, tmp_path):
    model = new_paws(**NETWORKS[network])
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    loaded = PAWSForPreTraining.from_pretrained(tmp_path).eval()
    for (name, found), wanted in zip(loaded.named_buffers(), model.buffers()):
        assert torch.equal(found, wanted), name
    torch.testing.assert_close(loaded.project(images()), model.project(images()), rtol=1e-5, atol=1e-6)


def test_shared_tensors_are_saved_once_and_stay_shared(tmp_path):
    new_paws(**COAT).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "encoder.cpe1.proj.weight" in names and "encoder.serial_blocks1.0.cpe.proj.weight" not in names
    encoder = PAWSForPreTraining.from_pretrained(tmp_path).encoder
    assert all(block.cpe.proj.weight is encoder.cpe1.proj.weight for block in encoder.serial_blocks1)
    assert SuNCEtForPreTraining.from_backbone(tmp_path).encoder.cpe1.proj.weight.equal(encoder.cpe1.proj.weight)


@pytest.mark.parametrize("network", ["resnet18", "resnetv2"])
def test_the_small_stem_keeps_the_sides(network):
    fields = NETWORKS[network]
    small, large = new_paws(**{**fields, "small_image_stem": True}), new_paws(**fields)
    sides = []
    for model in (small, large):
        blocks = model.encoder.layer1 if network == "resnet18" else model.encoder.stages[0]
        blocks.register_forward_pre_hook(lambda module, args: sides.append(args[0].shape[-1]))
        model.encoder(torch.randn(2, 3, 32, 32))
    assert sides == [32, 8]
    stem = small.encoder if network == "resnet18" else small.encoder.stem
    convolution = stem.conv1 if network == "resnet18" else stem.conv
    # He initialisation by fan-out.
    deviation = (2 / (convolution.out_channels * 9)) ** 0.5
    assert convolution.weight.std().item() == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timm_model": "resnet19"}, r"'resnet19'.*Did you mean 'resnet\d+"),
        ({"timm_model": "resnet18", "timm_options": {"depht": 3}}, "resnet18.*depht"),
        ({"timm_model": "resnet18", "timm_options": {"num_classes": 3}}, "resnet18.*num_classes"),
        ({"timm_model": "test_vit", "timm_options": {"embed_dim": 30, "num_heads": 4}}, "test_vit.*divisible"),
        ({"timm_model": "test_vit", "small_image_stem": True}, "`small_image_stem`.*test_vit"),
    ],
)
def test_a_network_that_timm_cannot_make_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        PAWSForPreTraining(PAWSConfig(**HEADS, **fields))


def test_the_defaults_of_the_networks_of_paws_are_those_of_the_paper():
    with torch.device("meta"):
        encoder = timm.create_model("paws_wide_resnet")  # WideResNet-28-2
        wide, plain = (timm.create_model(name, num_classes=0) for name in ("paws_resnet", "resnet50"))
    kernels = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    assert sum(kernel.kernel_size == (3, 3) for kernel in kernels) == 1 + 3 * 4 * 2
    assert sum(p.numel() for p in encoder.parameters()) == 1_467_610 - 1_290 + 2_032  # no classifier, biases
    assert [m.momentum for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)] == [0.1] * 24 + [0.99]
    for (name, tensor), reference in zip(wide.named_parameters(), plain.parameters()):
        wanted = [2 * size for size in reference.shape[:2]] + list(reference.shape[2:])
        wanted[1:2] = [3] if name == "conv1.weight" else wanted[1:2]
        assert list(tensor.shape) == wanted, name
    assert wide.num_features == 4096


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of every kind that an encoder can be taken from."""
    torch.manual_seed(0)
    msn = tiny_model(**VIT)
    with torch.no_grad():  # target and online encoder differ
        for parameter in msn.encoder.parameters():
            parameter.add_(0.1)
    models = {
        "msn": msn,
        "paws": tiny_paws(prediction_head=True, prediction_hidden_dim=4, label_smoothing=0.1).float(),
        "timm": tiny_suncet(**RESNETV2).float(),
        "vit_msn": ViTMSNModel(MSNConfig(**VIT).to_vit_msn_config()),
    }
    found = {}
    for name, model in models.items():
        found[name] = (tmp_path_factory.mktemp(name), model)
        model.save_pretrained(found[name][0])
    return found


@pytest.mark.parametrize("target", [PAWSForPreTraining, SuNCEtForPreTraining])
@pytest.mark.parametrize("source", ["msn", "paws", "vit_msn", "timm"])
def test_a_model_starts_from_the_evaluated_encoder_of_any_checkpoint(folders, source, target):
    folder, original = folders[source]
    torch.manual_seed(7)
    model = target.from_backbone(folder, projection_hidden_dim=24, projection_dim=12, temperature=0.3)
    encoder = {"msn": "target_encoder", "vit_msn": None}.get(source, "encoder")
    wanted = (original if encoder is None else getattr(original, encoder)).state_dict()
    found = model.encoder.state_dict()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert model.config.timm_model == getattr(original.config, "timm_model", None)
    assert model.config.small_image_stem == (source == "timm")
    assert (model.config.projection_dim, model.config.temperature) == (12, 0.3)
    assert model.projection_head.fc1.weight.shape == (24, model.projection_head.fc1.in_features)
    assert (model.prediction_head is None) == (source != "paws" or target is SuNCEtForPreTraining)


def test_msn_starts_from_an_encoder_of_paws(folders):
    folder, original = folders["paws"]
    model = MSNForPreTraining.from_backbone(folder, num_prototypes=8)
    for encoder in (model.encoder, model.target_encoder):
        for name, wanted in original.encoder.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], wanted), name


def test_encoders_of_another_architecture_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"resnetv2_18.*MSNConfig"):
        MSNForPreTraining.from_backbone(folders["timm"][0])
    for source, fields in (
        ("paws", {"hidden_size": 32}),
        ("timm", {"small_image_stem": False}),
        ("timm", {"timm_options": None}),
        ("msn", {"timm_model": "test_resnet"}),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            PAWSForPreTraining.from_backbone(folders[source][0], **fields)
    with pytest.raises(ValueError, match=r"`hidden_size` .* ignores it"):
        PAWSForPreTraining.from_backbone(folders["timm"][0], hidden_size=64)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=10, **settings)).save_pretrained(tmp_path)
    for name, message in ((tmp_path, "'bert'"), (tmp_path / "typo", "typo"), ("timm:resnet19", "'resnet19'")):
        with pytest.raises(ValueError, match=message):
            PAWSForPreTraining.from_backbone(name)


def test_a_checkpoint_of_another_method_is_no_model_of_this_one(folders):
    with pytest.raises(ValueError, match=r"'paws'.*MSNForPreTraining.from_backbone"):
        MSNForPreTraining.from_pretrained(folders["paws"][0])
    with pytest.raises(ValueError, match=r"'vit_msn'.*MSNForPreTraining.from_backbone"):
        MSNForPreTraining.from_pretrained(folders["vit_msn"][0])
    with pytest.raises(ValueError, match=r"'msn'.*PAWSForPreTraining.from_backbone"):
        PAWSForPreTraining.from_pretrained(folders["msn"][0])  # whose online encoder would fit
