"""PAWSTrainer: the support of each micro-batch, LARS step by step, the log, refusals."""

import copy
import math

import datasets
import pytest
import torch
from semi_supervised_runs import LABELLED_ROWS, digits, load_images, make_run, support, transform, watch
from short_runs import assert_same_weights, logged, make_trainer
from tiny_semi_supervised import RESNET18

from hf_msn import ClassStratifiedSampler, MultiViewDataset, SupportDataset
from hf_msn.data.support import SupportCollator
from hf_msn.optim.lars import LARS


def expected_support(step: int, views_per_image: int = 1, **settings) -> dict[str, torch.Tensor]:
    """By the data layer alone, for one rank and seed 42, transformers' default."""
    dataset = support(views_per_image=views_per_image)
    sampler = ClassStratifiedSampler(
        dataset.labels, **{"global_images_per_class": 2, "seed": 42, "start_step": step, "num_steps": 1, **settings}
    )
    (positions,) = list(sampler)
    keys = [(step, place, position) for place, position in zip(sampler.places.tolist(), positions)]
    return SupportCollator()([dataset[key] for key in keys])


def test_each_micro_batch_has_the_support_of_its_number(tmp_path):
    trainer = make_run(tmp_path, max_steps=4, gradient_accumulation_steps=2, views_per_image=2)
    seen = watch(trainer)
    trainer.train()
    # 5 micro-batches per epoch: the third update has one, and the number of its other is skipped.
    numbers = [0, 1, 2, 3, 4, 6, 7]
    assert len(seen) == len(numbers)
    for number, inputs in zip(numbers, seen):
        wanted = expected_support(number, views_per_image=2)
        assert torch.equal(inputs["support_labels"], wanted["support_labels"])
        assert torch.equal(inputs["support_pixel_values"], wanted["support_pixel_values"])
        assert sorted(inputs["support_labels"].tolist()) == [1] * 4 + [5] * 4 + [9] * 4
        assert inputs["focal_pixel_values"].shape == (4, 1, 3, 4, 4)


def test_fewer_classes_and_more_images_than_there_are(tmp_path):
    trainer = make_run(tmp_path, max_steps=2, global_support_classes=2, global_support_images_per_class=3)
    seen = watch(trainer)
    trainer.train()
    for step, inputs in enumerate(seen):
        wanted = expected_support(step, global_classes=2, global_images_per_class=3)
        assert torch.equal(inputs["support_pixel_values"], wanted["support_pixel_values"])
        assert len(set(inputs["support_labels"].tolist())) == 2 and len(inputs["support_labels"]) == 6


def rate(step: int, steps: int, warmup: int, start: float, peak: float, end: float) -> float:
    if step <= warmup:  # the first update has the start value
        return start + (peak - start) * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize("weight_decay", [1e-2, 0.0])
def test_a_run_with_lars_is_a_plain_loop(tmp_path, weight_decay):
    rates = {"start_learning_rate": 0.05, "learning_rate": 0.5, "final_learning_rate": 0.01}
    trainer = make_run(
        tmp_path,
        model_fields={"prediction_head": True},
        use_lars=True,
        weight_decay=weight_decay,
        final_weight_decay=None,
        max_steps=5,
        **rates,
    )
    # LARS scales a gradient that is mostly rounding as much as any other: float32 depends on the processor.
    trainer.model.double()
    plain, seen = copy.deepcopy(trainer.model), watch(trainer)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, LARS)

    momenta = {name: torch.zeros_like(parameter) for name, parameter in plain.named_parameters()}
    for step, inputs in enumerate(seen):
        lr = rate(step, 5, 2, *rates.values())
        assert logged(trainer, "learning_rate")[step + 1] == pytest.approx(lr, rel=1e-9)
        loss = plain(**inputs).loss
        assert logged(trainer)[step + 1] == pytest.approx(loss.item(), rel=1e-6)
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                update = parameter.grad
                if parameter.ndim > 1:  # neither biases nor norms: they are not adapted and do not decay
                    size, slope = parameter.norm(), update.norm()
                    ratio = 0.001 * size / (slope + weight_decay * size + 1e-8) if size > 0 and slope > 0 else 1.0
                    update = ratio * (update + weight_decay * parameter)
                momenta[name] = 0.9 * momenta[name] + lr * update
                parameter.sub_(momenta[name])
    for (name, found), wanted in zip(trainer.model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9, msg=name)


def test_scales_of_shortcuts_are_adapted_where_asked_for(tmp_path):
    for adapted in (False, True):
        trainer = make_run(tmp_path, model_fields=RESNET18, use_lars=True, adapt_shortcut_scales=adapted)
        decayed = set(trainer.get_decay_parameter_names(trainer.model))
        parameters = dict(trainer.model.named_parameters())
        assert {name for name in decayed if parameters[name].ndim == 1} == (
            {f"encoder.layer{stage}.0.downsample.1.weight" for stage in range(1, 5)} if adapted else set()
        )
        assert {name for name, p in parameters.items() if p.ndim > 1} <= decayed
        groups = trainer.create_optimizer().param_groups
        assert [len(group["params"]) for group in groups] == [len(decayed), len(parameters) - len(decayed)]


def test_the_log_has_the_parts_of_the_loss_and_of_the_targets(tmp_path):
    trainer = make_run(tmp_path, max_steps=2, logging_steps=2, model_fields={"me_max_weight": 0.5})
    outputs = []
    trainer.model.register_forward_hook(lambda module, args, output: outputs.append(output))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]

    def mean(values):
        return pytest.approx(sum(values) / len(values), rel=1e-5)

    assert entry["loss"] == mean([output.loss.item() for output in outputs])
    assert entry["cross_entropy"] == mean([output.cross_entropy.item() for output in outputs])
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.5 * entry["me_max"], rel=1e-5)
    targets = [output.target_probabilities.double() for output in outputs]
    classes = [target.argmax(dim=1) for target in targets]
    shares = [target.mean(dim=0) for target in targets]
    assert entry["view_agreement"] == mean([(c[:4] == c[4:]).double().mean().item() for c in classes])
    assert entry["mean_max_target_probability"] == mean([t.max(dim=1).values.mean().item() for t in targets])
    assert entry["classes_in_use"] == mean([math.exp(-torch.xlogy(p, p).sum().item()) for p in shares])


def test_evaluation_uses_one_support_and_leaves_the_run_as_it_was(tmp_path):
    images = MultiViewDataset(load_images("digits").select(range(40, 48)), transform(), seed=5)
    evaluated = make_run(
        tmp_path / "evaluated",
        changes={"eval_dataset": images},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        max_steps=2,
        gradient_accumulation_steps=2,
    )
    evaluated.train()
    plain = make_run(tmp_path / "plain", max_steps=2, gradient_accumulation_steps=2)
    plain.train()
    assert_same_weights(evaluated.model, plain.model)
    assert logged(evaluated) == logged(plain)

    found = logged(evaluated, "eval_loss")
    assert sorted(found) == [1, 2]
    batch = evaluated.data_collator([images[row] for row in range(8)])
    dataset = support()
    sampler = ClassStratifiedSampler(dataset.labels, global_images_per_class=2, seed=42)
    fixed = SupportCollator()([dataset[position] for position in sampler.batch(0)])
    with torch.no_grad():
        assert found[2] == pytest.approx(evaluated.model.eval()(**batch, **fixed).loss.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, changes, message",
    [
        ({"global_support_classes": 4}, {}, r"`global_support_classes` .* but is 4"),
        ({"global_support_classes": 1}, {}, "at least 2 classes to tell apart, but has 1 of the 3"),
        ({"support_shard": "ranks"}, {}, r"`support_shard` .* but is 'ranks'"),
        (
            {"support_on_small_class": "raise", "global_support_images_per_class": 3},
            {},
            r"`global_support_images_per_class` = 3 .* 1 have fewer: 9 has 2\..*support_on_small_class='repeat'",
        ),
        ({}, {"support_dataset": None}, "`support_dataset`"),
        ({}, {"support_dataset": load_images("digits")}, "`support_dataset`"),
        ({}, {"transform": {"image_size": 16}}, "`image_size` .* 16 x 16 pixels"),
        (
            {},
            {"support_dataset": SupportDataset(digits(), LABELLED_ROWS, transform(image_size=16))},
            "`image_size` .* 16 x 16 pixels in `support_pixel_values`",
        ),
        ({}, {"transform": {"anchor_views": 2}}, "`anchor_views` .* 2"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_step(tmp_path, settings, changes, message):
    if "transform" in changes:
        views = transform(**changes["transform"])
        changes = {"train_dataset": MultiViewDataset(load_images("digits").select(range(20)), views)}
    with pytest.raises(ValueError, match=message):
        make_run(tmp_path, changes=changes, **settings).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_class_names_that_differ_are_refused(tmp_path):
    def named(names):
        features = datasets.Features(
            {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)}
        )
        return load_images("digits").select(range(20)).cast(features)

    names = [str(number) for number in range(10)]
    rows = [1, 5, 9, 11, 13, 16, 17]
    labelled = SupportDataset(named(names), rows, transform())
    other = MultiViewDataset(named([*names[:5], "cat", *names[6:]]), transform())
    with pytest.raises(ValueError, match="'cat'"):
        make_run(tmp_path, changes={"support_dataset": labelled, "train_dataset": other}).train()
    same = MultiViewDataset(named(names), transform())
    make_run(tmp_path, changes={"support_dataset": labelled, "train_dataset": same}).check_before_training()


def test_a_size_that_a_timm_network_does_not_take_is_refused(tmp_path):
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    fields = {"timm_model": "vit_tiny_patch16_224", "timm_options": options}
    trainer = make_run(tmp_path, model_fields=fields)
    with pytest.raises(ValueError, match=r"`focal_size` .* 4 pixels, .*dynamic_img_size"):
        trainer.train()
    assert trainer.model.encoder.training and trainer.state.global_step == 0
    fields["timm_options"] = {**options, "dynamic_img_size": True}
    make_run(tmp_path, model_fields=fields).check_before_training()


@pytest.mark.parametrize("method", ["msn", "paws", "suncet"])
def test_the_model_of_another_method_is_refused(tmp_path, method):
    trainer = make_trainer(tmp_path) if method == "msn" else make_run(tmp_path, method)
    other = make_run(tmp_path, "suncet" if method == "paws" else "paws").model
    support_dataset = {} if method == "msn" else {"support_dataset": trainer.support_dataset}
    with pytest.raises(ValueError, match=f"`model` of .* a {type(trainer.model).__name__}, but is a .*ForPreT"):
        type(trainer)(other, trainer.args, train_dataset=trainer.train_dataset, **support_dataset)
