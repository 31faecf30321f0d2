"""Private and semi-private names of other libraries that hf_msn relies on, with what it counts on.

A release that breaks one of them fails here, by name. Two tests hold the lists complete: a new use must be entered.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from dog import DoG
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DefaultFlowCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTMSNConfig,
)

from hf_msn.trainers.callbacks.codistillation import _as_ranks

PACKAGE = Path(__file__).parents[1] / "hf_msn"

# Methods of Trainer that hf_msn overrides or calls, beyond train, evaluate, predict, save_model: their parameters.
TRAINER = {
    "_clip_grad_norm": "model",
    "_evaluate": "trial ignore_keys_for_eval skip_scheduler",
    "_get_dataloader": "dataset description batch_size sampler_fn is_training dataloader_key",
    "_get_grad_norm": "model grad_norm",
    "_get_output_dir": "trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_prepare_inputs": "inputs",
    "_push_from_checkpoint": "checkpoint_folder",
    "_run_epoch": "model epoch train_dataloader ...",
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "_save_rng_state": "output_dir",
    "compute_loss": "model inputs return_outputs num_items_in_batch",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps optimizer",
    "evaluation_loop": "dataloader ...",
    "get_batch_samples": "epoch_iterator num_batches device",
    "get_decay_parameter_names": "model",
    "get_optimizer_cls_and_kwargs": "args model",
    "init_hf_repo": "token private",
    "log": "logs start_time",
    "save_model": "output_dir _internal_call",
    "training_step": "model inputs num_items_in_batch",
}

# Names that hf_msn imports from modules below the top of a library. Each must exist; some have a contract below.
SUBMODULES = """
accelerate.commands.launch: launch_command launch_command_parser
accelerate.state: AcceleratorState
accelerate.utils: broadcast_object_list
datasets.data_files: SPLIT_KEYWORDS
datasets.packaged_modules.imagefolder.imagefolder: ImageFolder
huggingface_hub.dataclasses: strict
huggingface_hub.errors: HTTPError HfHubHTTPError OfflineModeIsEnabled
huggingface_hub.utils: validate_repo_id
huggingface_hub.utils.sha: sha_fileobj
timm.layers: DropPath resample_patch_embed
timm.models: build_model_with_cfg generate_default_cfgs register_model
timm.models.resnet: BasicBlock Bottleneck ResNet
transformers.activations: ACT2FN
transformers.hf_argparser: HfArg string_to_bool
transformers.masking_utils: create_bidirectional_mask
transformers.modeling_outputs: BaseModelOutput ImageClassifierOutput
transformers.modeling_utils: ALL_ATTENTION_FUNCTIONS
transformers.models.auto.modeling_auto: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
transformers.models.vit_msn.modeling_vit_msn: ViTMSNAttention ViTMSNEmbeddings ViTMSNLayer ViTMSNMLP
transformers.models.vit_msn.modeling_vit_msn: ViTMSNPreTrainedModel eager_attention_forward
transformers.trainer: OPTIMIZER_NAME TRAINER_STATE_NAME
transformers.trainer_callback: PrinterCallback ProgressCallback
transformers.trainer_utils: HubStrategy get_last_checkpoint has_length rotate_checkpoints
transformers.utils: ModelOutput cached_file logging
transformers.utils.generic: merge_with_config_defaults
transformers.utils.output_capturing: capture_outputs
"""

# Private attributes of other libraries' objects: the object that has them.
ATTRIBUTES = {
    "_attn_implementation": "transformers.PreTrainedConfig",
    "_backward_hooks": "torch.nn.Module",
    "_backward_pre_hooks": "torch.nn.Module",
    "_buffers": "torch.nn.Module",
    "_comm_hooks": "DistributedDataParallel",
    "_current_graph_task_id": "torch._C",
    "_foreach_add_": "torch",
    "_foreach_copy_": "torch",
    "_foreach_div": "torch",
    "_foreach_div_": "torch",
    "_foreach_lerp_": "torch",
    "_foreach_mul": "torch",
    "_foreach_mul_": "torch",
    "_foreach_norm": "torch",
    "_foreach_sub_": "torch",
    "_forward_hooks": "torch.nn.Module",
    "_forward_pre_hooks": "torch.nn.Module",
    "_get_default_store": "torch.distributed.distributed_c10d",
    "_is_mkldnn_bf16_supported": "torch.ops.mkldnn",
    "_non_persistent_buffers_set": "torch.nn.Module",
    "_orig_mod": "a compiled module",
    "_resolve_features": "datasets.IterableDataset",
    "_train_batch_size": "transformers.Trainer",
    "_world": "torch.distributed.distributed_c10d",
}
NAMED_TUPLE = {"_replace", "_asdict", "_fields"}  # public, in spite of the underscore


def package_trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def submodule_names() -> dict[str, set[str]]:
    listed: dict[str, set[str]] = {}
    for line in SUBMODULES.strip().splitlines():
        module, names = line.split(": ")
        listed.setdefault(module, set()).update(names.split())
    return listed


@pytest.mark.parametrize(("name", "expected"), TRAINER.items())
def test_methods_of_trainer_take_the_parameters_that_we_pass(name, expected):
    found = [parameter for parameter in inspect.signature(getattr(Trainer, name)).parameters if parameter != "self"]
    names = expected.split()
    if names and names[-1] == "...":
        assert found[: len(names) - 1] == names[:-1]
    else:
        assert found == names


def test_imported_names_exist():
    missing = [
        f"{module}.{name}"
        for module, names in submodule_names().items()
        for name in names
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not missing


def test_every_import_from_below_the_top_of_a_library_is_listed():
    found: dict[str, set[str]] = {}
    for tree in package_trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                library, _, below = node.module.partition(".")
                if below and library in {"transformers", "accelerate", "datasets", "huggingface_hub", "timm"}:
                    found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    assert found == submodule_names()


def test_every_private_method_of_trainer_in_use_is_listed():
    used = set()
    for tree in package_trees().values():
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "name", None)
            if isinstance(name, str) and re.match(r"_[a-z]", name) and hasattr(Trainer, name):
                used.add(name)
    assert used == {name for name in TRAINER if name.startswith("_")}


def test_every_private_attribute_of_another_object_is_ours_or_listed():
    ours, used = set(), {}
    for file, tree in package_trees().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                if isinstance(node.ctx, ast.Store):
                    ours.add(node.attr)
                used[node.attr] = file.name
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                ours.add(node.target.id)
            elif isinstance(node, ast.Assign):
                ours.update(target.id for target in node.targets if isinstance(target, ast.Name))
    foreign = {name: file for name, file in used.items() if name not in {*ours, *TRAINER, *NAMED_TUPLE}}
    assert set(foreign) == set(ATTRIBUTES), foreign


def test_accelerate_shards_loaders_and_gathers_as_its_states_say():
    args = TrainingArguments(use_cpu=True)
    accelerator, rows = Accelerator(cpu=True), torch.arange(8)
    assert args.process_index == 0
    with _as_ranks(2, 1):
        loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=2))
        assert accelerator.gather_for_metrics(rows) is rows
        assert args.process_index == 1  # which seeds the workers
    assert [batch.tolist() for batch in loader] == [[2, 3], [6, 7]]
    assert accelerator.num_processes == 1


def test_private_attributes_exist():
    assert DistributedDataParallel.register_comm_hook and "_comm_hooks" in inspect.getsource(DistributedDataParallel)
    module = torch.nn.BatchNorm1d(1)
    assert set(module._buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    assert not any(hooks) and module._non_persistent_buffers_set == set()
    assert torch._C._current_graph_task_id() == -1  # no backward pass is running
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    assert ViTMSNConfig(attn_implementation="eager")._attn_implementation == "eager"
    tied = inspect.getsource(PreTrainedModel.get_expanded_tied_weights_keys)
    assert "_tied_weights_keys" in tied and PreTrainedModel._tied_weights_keys is None
    assert datasets.IterableDataset._resolve_features
    assert "self._train_batch_size = batch_size" in inspect.getsource(Trainer)  # auto_find_batch_size
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(module.parameters(), lr=0.5), lambda step: 1.0)
    assert scheduler._last_lr == scheduler.get_last_lr() == [0.5]
    assert torch.compile(torch.nn.Linear(1, 1))._orig_mod is not None
    assert DoG(module.parameters())._first_step is True
    assert callable(dist.distributed_c10d._get_default_store) and dist.distributed_c10d._world.pg_map is not None
    one = [torch.ones(2), torch.ones(3)]
    two = [torch.zeros(2), torch.zeros(3)]
    torch._foreach_copy_(two, one)
    torch._foreach_mul_(two, 4.0)
    torch._foreach_lerp_(two, one, 0.5)
    torch._foreach_div_(two, 5.0)
    assert [tensor.tolist() for tensor in torch._foreach_div(two, 0.5)] == [[1.0] * 2, [1.0] * 3]
    torch._foreach_add_(two, torch._foreach_mul(one, 2.5))
    torch._foreach_sub_(two, one)
    assert [norm.item() for norm in torch._foreach_norm(two)] == pytest.approx([2.0 * 2**0.5, 2.0 * 3**0.5])


class Recorder(TrainerCallback):
    """Note the events of a run, with the state that hf_msn relies on at each."""

    def __init__(self, parameter: torch.nn.Parameter):
        self.parameter, self.events = parameter, []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        self.events.append(("on_optimizer_step", state.global_step, self.parameter.grad is not None, rate))

    def on_step_end(self, args, state, control, **kwargs):
        has_gradient = self.parameter.grad is not None
        self.events.append(("on_step_end", state.global_step, has_gradient, control.should_save))

    def on_save(self, args, state, control, **kwargs):
        written = Path(args.output_dir, f"checkpoint-{state.global_step}", "optimizer.pt").is_file()
        self.events.append(("on_save", state.global_step, written))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("on_train_end", state.global_step))


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * x).mean()}


def test_events_of_a_run_come_in_the_order_that_callbacks_rely_on(tmp_path):
    model = Loss()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        learning_rate=1.0,
        save_steps=2,
        save_strategy="steps",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[{"x": torch.ones(1)}] * 4)
    recorder = Recorder(model.weight)
    trainer.add_callback(recorder)
    assert isinstance(trainer.callback_handler.callbacks[0], DefaultFlowCallback)  # it sets `should_save` first
    trainer.train()
    # The gradient and the rate of the step are still there; the step has been counted when it ends.
    assert recorder.events == [
        ("on_optimizer_step", 0, True, 1.0),
        ("on_step_end", 1, False, False),
        ("on_optimizer_step", 1, True, 0.5),
        ("on_step_end", 2, False, True),
        ("on_save", 2, True),
        ("on_train_end", 2),
    ]


def test_the_list_of_callbacks_can_be_replaced_while_the_training_begins(tmp_path):
    seen = []

    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append("late")

    class First(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            handler = trainer.callback_handler
            handler.callbacks = [self, *(one for one in handler.callbacks if one is not self)]

        def on_step_end(self, args, state, control, **kwargs):
            seen.append("first")

    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(Loss(), arguments, train_dataset=[{"x": torch.ones(1)}] * 8, callbacks=[Late(), First()])
    trainer.train()
    assert seen == ["first", "late"]
