import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny_semi_supervised import VIT
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMSNForImageClassification,
)

from hf_msn.evaluation.backbones import (
    evaluated_module,
    evaluation_mode,
    feature_function,
    find_backbone,
    load_vision_model,
    resolve_image_processor,
    weights_sha256,
)
from hf_msn.models.configuration_msn import MSNConfig
from hf_msn.models.configuration_paws import PAWSConfig
from hf_msn.models.configuration_suncet import SuNCEtConfig
from hf_msn.models.modeling_msn import MSNForPreTraining
from hf_msn.models.modeling_paws import PAWSForPreTraining
from hf_msn.models.modeling_suncet import SuNCEtForPreTraining

SMALL = {**VIT, "image_size": 8, "patch_size": 2}


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny_msn():
    torch.manual_seed(0)
    model = MSNForPreTraining(MSNConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def outputs_of(blocks, run):
    """Return the output of each block during `run`."""
    seen = []
    hooks = [block.register_forward_hook(lambda *args: seen.append(args[2])) for block in blocks]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return [output[0] if isinstance(output, tuple) else output for output in seen]


def features_of(model, pixels, **settings):
    backbone = find_backbone(model)
    with evaluation_mode(backbone):
        return feature_function(backbone, **settings)(pixels)


def wrapped(model):
    """Wrap a model like `DistributedDataParallel`, as `module`."""
    return torch.nn.ModuleDict({"module": model})


def test_features_are_cls_of_the_last_block_before_the_final_norm(tiny_vit, pixels):
    blocks = outputs_of(tiny_vit.layers, lambda: tiny_vit(pixels))
    features = features_of(tiny_vit, pixels)
    torch.testing.assert_close(features, blocks[-1][:, 0])
    assert not torch.allclose(features, tiny_vit.layernorm(blocks[-1])[:, 0], atol=1e-2)


def test_last_layers_are_concatenated_the_earliest_first(tiny_vit, pixels):
    blocks = outputs_of(tiny_vit.layers, lambda: tiny_vit(pixels))
    expected = torch.cat([blocks[1][:, 0], blocks[2][:, 0]], dim=1)
    torch.testing.assert_close(features_of(tiny_vit, pixels, num_last_layers=2), expected)


def test_msn_is_evaluated_by_its_target_encoder(tiny_msn, pixels):
    encoder = tiny_msn.target_encoder
    blocks = outputs_of(encoder.layers, lambda: encoder(pixel_values=pixels))
    torch.testing.assert_close(features_of(tiny_msn, pixels), blocks[-1][:, 0])
    assert find_backbone(tiny_msn) is encoder


def test_projections_are_those_of_the_model_in_evaluation_mode(around_timm, tiny_msn, pixels):
    for model, images in ((around_timm, torch.randn(3, 3, 32, 32)), (tiny_msn.train(), pixels)):
        module, project = evaluated_module(model, "projection")
        assert module is model
        with evaluation_mode(module):
            projections = project(images)
            one_by_one = torch.cat([project(image[None]) for image in images])
        torch.testing.assert_close(projections, one_by_one, rtol=1e-4, atol=1e-5)  # no batch statistics
        assert model.training
        with torch.no_grad():
            torch.testing.assert_close(projections, model.eval().project(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_class", "config_class", "prefix"),
    [(PAWSForPreTraining, PAWSConfig, ""), (MSNForPreTraining, MSNConfig, "target_")],
)
def test_predictions_are_the_prediction_head_on_the_projections(model_class, config_class, prefix, pixels):
    model = model_class(config_class(**SMALL, projection_hidden_dim=12, projection_dim=6, prediction_head=True))
    head = getattr(model, f"{prefix}prediction_head")
    with torch.no_grad():
        for batch_norm in (head.bn1, head.bn2):  # running statistics of their own, which evaluation must use
            batch_norm.running_mean.uniform_(-1, 1)
            batch_norm.running_var.uniform_(0.5, 2)
    module, predict = evaluated_module(model.train(), "prediction")
    with evaluation_mode(module):
        found, z = predict(pixels).double(), model.project(pixels).double()
    for batch_norm, linear in ((head.bn1, head.fc1), (head.bn2, head.fc2)):
        z = (z - batch_norm.running_mean) / (batch_norm.running_var.double() + 1e-5).sqrt()
        z = z * batch_norm.weight.double() + batch_norm.bias.double()
        if linear is head.fc2:
            z = z.relu() if prefix == "" else torch.nn.functional.gelu(z)
        z = z @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(found, z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "features", "num_last_layers", "message"),
    [
        ("tiny_msn", "prediction", 1, "a prediction head, but this MSNForPreTraining has none"),
        ("tiny_vit", "prediction", 1, "ViTMSNModel"),
        ("tiny_vit", "projection", 1, "ViTMSNModel"),
        ("tiny_msn", "projection", 2, "`num_last_layers` .* but is 2"),
        ("tiny_msn", "head", 1, "`features` .* but is 'head'"),
    ],
)
def test_features_without_a_head_or_block_are_refused(request, model, features, num_last_layers, message):
    with pytest.raises(ValueError, match=message):
        evaluated_module(request.getfixturevalue(model), features, num_last_layers)


def test_all_patches_are_seen_whatever_the_mask_ratio(tiny_msn, pixels):
    tiny_msn.config.mask_ratio = 0.7
    first = features_of(tiny_msn.train(), pixels)
    torch.testing.assert_close(features_of(tiny_msn, pixels), first, rtol=0, atol=0)


def test_base_of_a_classifier_gives_the_features(tiny_vit, pixels):
    classifier = ViTMSNForImageClassification(tiny_vit.config)
    classifier.vit.load_state_dict(tiny_vit.state_dict())
    torch.testing.assert_close(features_of(classifier, pixels), features_of(tiny_vit, pixels))


def test_images_of_another_size_get_interpolated_positions(tiny_vit, pixels):
    larger = torch.nn.functional.interpolate(pixels, size=12)
    blocks = outputs_of(tiny_vit.layers, lambda: tiny_vit(larger, interpolate_pos_encoding=True))
    torch.testing.assert_close(features_of(tiny_vit, larger), blocks[-1][:, 0])


@pytest.mark.slow
def test_wrappers_are_removed(tiny_vit, around_timm):
    assert find_backbone(wrapped(torch.compile(tiny_vit))) is tiny_vit
    assert evaluated_module(wrapped(around_timm), "projection")[0] is around_timm


def test_image_text_models_and_models_whose_base_takes_no_pixels_give_their_cls(pixels):
    text = {**SMALL, "vocab_size": 10, "max_position_embeddings": 4}
    text.pop("image_size"), text.pop("patch_size")
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=8)).eval()
    dinov3 = DINOv3ViTModel(DINOv3ViTConfig(**SMALL)).eval()
    for model, backbone in ((clip, clip.vision_model), (dinov3, dinov3)):
        with torch.no_grad():
            expected = backbone(pixels, output_hidden_states=True).hidden_states[-1][:, 0]
        torch.testing.assert_close(features_of(model, pixels), expected)


def test_mae_sees_all_patches_and_draws_no_random_numbers(pixels):
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            **SMALL, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, mask_ratio=0.75
        )
    )
    state = torch.get_rng_state()
    blocks = outputs_of(model.vit.layers, lambda: features_of(model, pixels))
    assert blocks[-1].shape[1] == 1 + 16
    assert torch.equal(torch.get_rng_state(), state)
    assert model.vit.config.mask_ratio == 0.75


def test_models_without_cls_give_their_pooled_output_or_the_mean_of_their_tokens(pixels):
    swin = SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=2)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    for model in (ResNetModel(resnet), SwinModel(swin)):
        with torch.no_grad():
            expected = model.eval()(pixels).pooler_output.flatten(1)
        torch.testing.assert_close(features_of(model, pixels), expected)
        with pytest.raises(ValueError, match=f"`num_last_layers` .* {type(model).__name__}, but is 2"):
            feature_function(model, num_last_layers=2)
    model = SwinModel(swin, add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = model(pixels).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(features_of(model, pixels), expected)


def test_timm_models_give_the_input_of_their_classifier():
    model = timm.create_model("resnet10t").eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.get_classifier()(features_of(model, pixels)), model(pixels))


def test_more_layers_than_blocks_are_refused(tiny_vit, pixels):
    with pytest.raises(ValueError, match=r"`num_last_layers` .* is 4"):
        features_of(tiny_vit, pixels, num_last_layers=4)


def test_model_without_a_vision_encoder_is_refused():
    with pytest.raises(ValueError, match="Linear"):
        find_backbone(torch.nn.Linear(2, 2))
    text_config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    with pytest.raises(ValueError, match="BertModel"):
        find_backbone(BertModel(text_config))


def test_training_flags_and_grad_mode_are_restored(tiny_vit):
    tiny_vit.train()
    tiny_vit.layers[0].eval()
    flags = [module.training for module in tiny_vit.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluation_mode(tiny_vit):
        assert not any(module.training for module in tiny_vit.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert [module.training for module in tiny_vit.modules()] == flags
    assert torch.is_grad_enabled()


def test_transformers_checkpoint_loads_with_its_image_processor(tmp_path, tiny_vit, processor, pixels):
    tiny_vit.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_vision_model(str(tmp_path))
    assert resolve_image_processor(loaded).to_dict() == processor.to_dict()
    torch.testing.assert_close(features_of(loaded, pixels), features_of(tiny_vit, pixels), rtol=0, atol=0)


def test_timm_models_have_their_own_transform():
    transform = resolve_image_processor(timm.create_model("resnet10t"))
    image = Image.fromarray(np.full((200, 200, 3), 124, dtype=np.uint8))
    pixels = transform(image)
    assert pixels.shape == (3, 176, 176)
    torch.testing.assert_close(pixels[0, 0, 0], torch.tensor((124 / 255 - 0.485) / 0.229))


def test_only_a_saved_image_processor_is_used(tmp_path, tiny_vit, around_timm, processor):
    for model in (tiny_vit, around_timm):
        with pytest.raises(ValueError, match=type(model).__name__):
            resolve_image_processor(model)
        model.name_or_path = str(tmp_path)
        with pytest.raises(ValueError, match="`image_processor=`"):
            resolve_image_processor(model)
    processor.save_pretrained(tmp_path)
    for model in (tiny_vit, around_timm, wrapped(around_timm)):
        assert resolve_image_processor(model).to_dict() == processor.to_dict()


@pytest.mark.parametrize(
    ("config_class", "model_class", "encoder"),
    [
        (MSNConfig, MSNForPreTraining, SMALL),
        (PAWSConfig, PAWSForPreTraining, {"timm_model": "test_resnet"}),
        (SuNCEtConfig, SuNCEtForPreTraining, SMALL),
    ],
)
def test_pretraining_checkpoints_load_whole_with_their_image_processor(
    tmp_path, processor, config_class, model_class, encoder
):
    torch.manual_seed(0)
    model = model_class(config_class(**encoder, projection_hidden_dim=12, projection_dim=5))
    pixels = torch.randn(4, 3, 8, 8) if encoder is SMALL else torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        model.train().project(pixels)  # moves the running statistics
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_vision_model(str(tmp_path))
    assert type(loaded) is model_class and not loaded.training
    assert find_backbone(loaded) is loaded.evaluation_encoder
    assert resolve_image_processor(loaded).to_dict() == processor.to_dict()
    assert weights_sha256(find_backbone(loaded)) == weights_sha256(find_backbone(model))
    torch.testing.assert_close(features_of(loaded, pixels), features_of(model, pixels), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            evaluated_module(loaded, "projection")[1](pixels), model.project(pixels), rtol=0, atol=0
        )


def test_timm_checkpoints_load_from_a_folder_and_from_a_file(tmp_path):
    model = timm.create_model("resnet10t").eval()
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    pixels = torch.randn(2, 3, 32, 32)
    folder = load_vision_model(f"timm:{tmp_path / 'folder'}")
    file = load_vision_model("timm:resnet10t", checkpoint=str(tmp_path / "weights.pth"))
    for loaded in (folder, file):
        torch.testing.assert_close(features_of(loaded, pixels), features_of(model, pixels), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "checkpoint", "message"),
    [
        ("timm:no_such_net", None, "'no_such_net'"),
        ("/no/such/folder", None, "'/no/such/folder'"),
        ("some/model", "weights.pth", "`checkpoint` .* 'some/model'"),
    ],
)
def test_models_that_cannot_be_loaded_raise(name, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        load_vision_model(name, checkpoint=checkpoint)
