"""Every command of README.md and docs/, in the order of the pages, shortened by flags at its end."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from original_reference import msn_checkpoint
from pretrain_runs import COLORS, write_color_images

from hf_msn import parse_recipe

ROOT = Path(__file__).parents[2]
PAGES = [
    "README",
    "docs/pretraining",
    "docs/methods/byol",
    "docs/few_labels",
    "docs/evaluation",
    "docs/publishing",
    "docs/released_checkpoints",
    "docs/communication",
]
PAGES += ["docs/compression", "docs/first_run", "model_cards/README"]
# They need the network, root or minutes; the scripts among them have tests of their own.
LEFT_OUT = ("pip ", "make ", "hf auth ", "sudo ", "python scripts/compare_codistillation.py", "accelerate ")
LEFT_OUT += ("torchrun ", "export ", "python scripts/benchmarks/sync_accuracy.py")
SHORT = {
    "pretrain": "--use_cpu true --bf16 false --max_steps 2 --warmup_steps 0 --per_device_train_batch_size 8 "
    "--num_processes 1 --dataloader_num_workers 0 --report_to none --disable_tqdm true --overwrite_output_dir true",
    "finetune": "--use_cpu true --num_train_epochs 1 --disable_tqdm true --overwrite_output_dir true",
    "evaluate": "--num_splits 1 --images_per_class 1",
    "find-compression": "--batches 3 --dropouts 0 0.5",
    "plan-sync": "--ranks 8",
    "publish": "--dry_run true",
    "card": "--plot false",
    "convert": "--num_attention_heads 4",
}
TINY = "--num_hidden_layers 1 --hidden_size 32 --num_attention_heads 2 --intermediate_size 32 --image_size 32 "
TINY += "--patch_size 8 --focal_size 16"


def commands() -> list[list[str]]:
    """Return the words of each command, without comments."""
    found = []
    for page in PAGES:
        text = (ROOT / f"{page}.md").read_text()
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True) for line in lines if not line.startswith(LEFT_OUT)]
    return [words for words in found if words]


def shortened(words: list[str], images: Path) -> list[str]:
    """Return the command with flags at its end that make it small."""
    command = words[1]
    flags = SHORT[command].split()
    if command == "pretrain" and "--timm_model" not in words:
        flags += TINY.split()
    if "resnet18" in words:
        flags += ["--timm_options", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}']
    if "/path/to/images" in words or "imagenet" in " ".join(words):
        flags += ["--dataset", str(images)]
    elif command == "evaluate":
        flags += ["--train_split", "train[:300]", "--test_split", "test[:100]"]
    if "--max_minutes" in words:
        flags += ["--max_minutes", "0.01"]
    if "--to_original" in words:
        flags = []
    return [*words, *flags]


@pytest.mark.slow
def test_every_documented_command_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_color_images(tmp_path / "images")
    Path("spaces").symlink_to(ROOT / "spaces")
    Path("labelled.txt").write_text("".join(f"{name}_train_{row}.png\n" for name in COLORS for row in range(5)))
    torch.save(msn_checkpoint(), "vits16_800ep.pth.tar")
    made = commands()
    assert len(made) >= 15 and {words[1] for words in made if words[0] == "hf-msn"} == set(SHORT)
    for words in made:
        assert words[0] == "hf-msn", words
        command(*shortened(words, tmp_path / "images")[1:])
    assert Path("runs/slowmo/model.safetensors").is_file()


def test_a_documented_command_on_the_digits_trains_at_their_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("schedule.json").write_text('[{"progress": 0}]')  # as `hf-msn find-compression` writes it
    on_digits = [words for words in commands() if words[1] == "pretrain" and "/path/to/images" not in words]
    for words in on_digits:
        arguments = re.sub(r"--num_processes \d+", "", " ".join(words[2:])).split()
        recipe = parse_recipe([*arguments, "--bf16", "false"])
        assert recipe.data.dataset != "digits" or recipe.views.image_size == 8, words
    assert any("slowmo" in words for words in on_digits)
