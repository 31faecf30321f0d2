"""The `hf-msn` command: help, unknown names, processes, and the scripts that are entries to it."""

import os
import runpy
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from tiny import TINY_RUN, tiny_model
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from hf_msn import ClassifierFinetuningArguments
from hf_msn.cli.help import help_texts
from hf_msn.cli.main import HELP, main, show_message, without_debug

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for path in sorted((ROOT / "scripts").rglob("*.py")) if "__main__" in path.read_text()]
ENTRIES = ("pretrain", "finetune", "evaluate_low_shot", "publish", "convert_checkpoint", "make_model_card")


def test_help_loads_neither_torch_nor_transformers():
    for arguments in ([], ["pretrain", "--method", "paws", "--help"], ["publish", "--help"]):
        code = f"from hf_msn.cli.main import main; main({arguments}); import sys; print(sorted(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "'torch'" not in done.stdout and "'transformers'" not in done.stdout
        assert "hf-msn" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_answers_help(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.syspath_prepend(script.parent)
    with nullcontext() if script.stem in ENTRIES else pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("pretrain.py", ["--output-dir", "run", "--learning-rat", "1"]),
        ("finetune.py", ["--output_dir", __file__]),
        ("benchmarks/sync.py", ["--methods", "nothing"]),
    ],
)
def test_a_wrong_input_shows_the_message_alone_and_debug_the_traceback(script, arguments, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "benchmarks")
    for debug, is_shown in ([], False), (["--debug"], True):
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        monkeypatch.setattr(sys, "argv", [script, *debug, *arguments])
        with pytest.raises(ValueError) as caught:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        sys.excepthook(caught.type, caught.value, caught.tb)
        shown = capsys.readouterr().err
        assert ("Traceback" in shown) == is_shown and str(caught.value) in shown
        assert is_shown or shown == f"{caught.value}\n"


def test_debug_with_a_value_is_the_field_of_the_trainer():
    given = ["--debug", "underflow_overflow", "--seed", "1"]
    assert without_debug(given) == given
    assert without_debug(["--seed", "1", "--debug"]) == without_debug(["--debug", "--seed", "1"]) == ["--seed", "1"]


def test_a_fault_of_ours_keeps_its_traceback(capsys):
    show_message(KeyError, KeyError("x"), None)
    assert "KeyError" in capsys.readouterr().err


class _Refused(torch.utils.data.Dataset):
    def __getitem__(self, index):
        try:
            raise OSError("the cause")
        except OSError as error:
            raise ValueError("image 3 is broken:\nremove it") from error

    def __len__(self):
        return 1


def test_an_error_in_a_worker_of_a_loader_shows_its_message_alone(capsys):
    with pytest.raises(ValueError) as caught:
        next(iter(torch.utils.data.DataLoader(_Refused(), num_workers=1)))
    assert "the cause" in str(caught.value)
    show_message(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err == "image 3 is broken:\nremove it\n"


def test_the_help_files_are_those_of_the_parsers():
    """After a change of a field or docstring: python -m hf_msn.cli.help"""
    texts = help_texts()
    assert {path.name for path in HELP.glob("*.txt")} == set(texts)
    if (HELP / "transformers_version").read_text().strip() != transformers.__version__:
        pytest.skip("the fields and texts of TrainingArguments differ between versions of transformers")
    for name, text in texts.items():
        assert (HELP / name).read_text().split() == text.split(), name


def test_the_help_is_that_of_the_method(capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: suncet\n")
    shown = {}
    for arguments in (["--help"], ["--method", "paws", "-h"], ["--config", str(tmp_path / "recipe.yaml"), "--help"]):
        main(["pretrain", *arguments])
        shown[arguments[0]] = capsys.readouterr().out
    assert "--mask_ratio" in shown["--help"] and "--supervised_epochs" not in shown["--help"]
    assert "--prediction_head" in shown["--method"] and "--mask_ratio" not in shown["--method"]
    assert "--supervised_epochs" in shown["--config"]
    with pytest.raises(ValueError, match=r"`method` .*'pawz'.*'paws'"):
        main(["pretrain", "--method", "pawz", "--help"])


@pytest.mark.parametrize(
    ("line", "name", "nearest"),
    [
        ("pretrian --config digits", "pretrian", "pretrain"),
        ("pretrain --learning_rat 1", "learning_rat", "learning_rate"),
        ("finetune --learning_rat 1", "learning_rat", "learning_rate"),
        ("evaluate --prob 1", "prob", "probe"),
        ("publish --result 1", "result", "results"),
        ("convert --outputs 1", "outputs", "output"),
        ("card --result 1", "result", "results"),
    ],
)
def test_an_unknown_command_or_field_names_the_nearest(line, name, nearest):
    with pytest.raises(ValueError, match=f"[`']{name}[`'].*'{nearest}'"):
        main(line.split())


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("pretrain --config", "config"),
        ("finetune --num_processes few", "num_processes"),
        ("finetune --num_processes -1e3", "num_processes"),
        ("pretrain --output_dir {out} --learning_rate -1e-3", "learning_rate"),
        ("pretrain --output_dir {out} --weight_decay -.5", "weight_decay"),
        ("pretrain --output_dir {out} --final_learning_rate -inf", "final_learning_rate"),
        ("convert --input /no/such --output {out}", "input"),
        ("convert --input {file} --output {file}", "output"),
        ("convert --input {file} --export_backbone {file}", "export_backbone"),
        ("convert --to_original --input /no/such --output {out}", "input"),
        ("convert --to_original --input /no/such --output {file}", "output"),
        ("evaluate --model {model} --dataset /no/such", "dataset"),
        ("evaluate --model {model} --train_split nosplit", "train_split"),
        ("evaluate --model {model} --test_split nosplit", "test_split"),
        ("pretrain --output_dir {out} --dataset /no/such", "dataset"),
        ("pretrain --output_dir {out} --train_split nosplit", "train_split"),
        ("pretrain --output_dir {out} --low_shot_every_epochs 1 --low_shot_test_split nosplit", "low_shot_test_split"),
        ("pretrain --output_dir {out} --method paws --labelled_dataset /no/such", "labelled_dataset"),
        ("finetune --output_dir {out} --labelled_fraction 0.1 --test_split nosplit", "test_split"),
    ],
)
def test_an_error_names_the_flag_that_was_typed(line, field, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_msn.cli.pretrain.Recipe.build_model", lambda recipe: tiny_model())
    monkeypatch.setattr("hf_msn.cli.finetune.HEADS", {"linear": (ClassifierFinetuningArguments, None)})
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    tiny = "--image_size 8 --patch_size 4 --focal_size 4 --use_cpu" if line.startswith("pretrain") else ""
    with pytest.raises((ValueError, OSError), match=f"^`{field}` "):
        places = {name: tmp_path / name for name in ("out", "file", "model")}
        main(line.format(**places).split() + tiny.split())


def test_several_processes_start_through_accelerate(monkeypatch):
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    main(["pretrain", "--num_processes", "3", "--config", "digits", "--use_cpu", "true"])
    (args,) = calls
    assert (args.num_processes, args.multi_gpu, args.module) == (3, True, True)
    assert args.training_script == "hf_msn.cli.main"
    assert args.training_script_args == ["pretrain", "--config", "digits", "--use_cpu", "true"]


# In each rank `hf-msn pretrain` is a command that needs no imports.
WRONG_INPUT = """
import sys, types

def main(arguments):
    raise ValueError(f"a wrong input: {arguments}")

sys.modules["hf_msn.cli.pretrain"] = types.SimpleNamespace(main=main)
"""


@pytest.mark.distributed
def test_a_wrong_input_shows_the_message_alone_on_several_processes(tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text(WRONG_INPUT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", "hf-msn pretrain --num_processes 2 --learning_rate -1".split())
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        with pytest.raises(ChildFailedError) as caught:  # the launcher needs no process, the ranks do
            main()
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
    sys.excepthook(caught.type, caught.value, caught.tb)
    out, err = capfd.readouterr()
    shown = {line.removeprefix("[rank0]: ").removeprefix("[rank1]: ") for line in err.splitlines()}
    assert shown == {"a wrong input: ['--learning_rate', '-1']"} and out == "", err


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_shows_its_supports_and_its_sync_method_on_rank_0(rank, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    settings = (
        "--method paws --labelled_images_per_class 2 --warmup_steps 0 --global_support_images_per_class 2 "
        "--per_device_train_batch_size 8 --sync slowmo --sync_every 2"
    )
    settings = ["--output_dir", str(tmp_path / "run"), *TINY_RUN, *settings.split(), "--max_steps"]
    main(["pretrain", *settings, "2"])
    shown = capsys.readouterr().err
    assert shown.count("Support of each step") == shown.count("SlowMo on 1 rank:") == (rank == "0")
    main(["pretrain", *settings, "3", "--resume_from_checkpoint", "true"])
    assert ("checkpoint-2" in capsys.readouterr().err) == (rank == "0")


def test_the_app_without_gradio_says_what_to_install_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_msn.app.interface", raising=False)
    with pytest.raises(ImportError, match=r"hf_msn\[app\]"):
        main(["app", "--model", "/no/such/model"])
    with pytest.raises(ValueError, match="`model`"):
        main(["app", "--port", "7000"])
