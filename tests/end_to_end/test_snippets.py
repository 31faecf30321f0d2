"""The Python of README.md, docs/ and the docstrings runs, page by page, on a few images and tiny models."""

import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launch import run_ranks
from PIL import Image
from pretrain_runs import COLORS, ROOT, write_color_images
from tiny import tiny_batch, tiny_model
from tiny_semi_supervised import RESNET18, VIT
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import hf_msn

ENCODER = ROOT / "spaces" / "low_shot" / "digits_encoder"
# Encoders that pages name.
TRAINED = ("runs/own", "runs/demo/model", "runs/trained", "user/name", "facebook/vit-msn-small")
TRAINED += ("path/to/msn-vit-digits",)
SHORT = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}
REPLACED = {
    "num_train_epochs=100": f"**{SHORT}",
    "max_steps=1000": f"**{SHORT}",
    "/path/to/images": "images",
    "path/to/images": "images",
    "patch_size=8, hidden_size=192, num_attention_heads=3, intermediate_size=768": (
        "patch_size=16, hidden_size=24, num_attention_heads=3, intermediate_size=24, num_hidden_layers=1, "
        "projection_hidden_dim=16, num_prototypes=8"
    ),
    'load_images("digits")': 'load_images("digits", split="train[:300]")',
    'load_images("digits", split="test")': 'load_images("digits", split="test[:100]")',
    "chunk_size=64": "chunk_size=2",
    "@24": "@2",
    "patch_size=24": "patch_size=2",
    'timm_model="resnet18"': f"**{RESNET18}",
    "CodistillationTrainer(...)": "CodistillationTrainer(model, trainer.args, train_dataset=trainer.train_dataset)",
}
ON_RANKS = ("communication", "codistillation", "local_update", "diloco", "noloco")  # parts of pages' names


def snippets() -> dict[str, str]:
    """Return the Python of each page, and of the docstrings of each module."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards").rglob("*.md")]
    found = {}
    for path in [*pages, *(ROOT / "hf_msn").rglob("*.py")]:
        blocks = re.findall(r"^( *)```python\n(.*?)^\1```", path.read_text(), re.MULTILINE | re.DOTALL)
        code = "\n".join(inspect.cleandoc("\n" + block) for _, block in blocks)
        if code:
            found[path.relative_to(ROOT).as_posix()] = re.sub(r"^(>>>|\.\.\.) ?", "", code, flags=re.MULTILINE)
    return found


def on_ranks(page: str) -> bool:
    return any(part in page for part in ON_RANKS)


def classifier_and_rows() -> tuple[nn.Module, list[dict]]:
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": row % 3} for row in range(8)]
    return ViTForImageClassification(ViTConfig(**VIT, num_labels=3)), rows


def given(page: str, code: str) -> dict:
    """Return the names that a page takes as given and its code has; a docstring's are those of its module, too."""
    names = {"Trainer": Trainer, **{name: getattr(hf_msn, name) for name in hf_msn.__all__}}
    if on_ranks(page):
        model, rows = classifier_and_rows()
        batches = torch.utils.data.DataLoader(rows, batch_size=4)
    else:
        model, rows, batches = tiny_model(), [], [tiny_batch()]
        model.predictor = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = hf_msn.load_images("images")
    makers = {
        "trainer": lambda: Trainer(model, TrainingArguments("runs/given", **SHORT), train_dataset=rows),
        "scheduler": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer),
        "accelerator": lambda: Accelerator(cpu=True),
        "image": lambda: Image.new("RGB", (20, 20)),
        "evaluator": lambda: hf_msn.LowShotEvaluator(
            images, hf_msn.load_images("images", split="test"), image_processor=hf_msn.evaluation_image_processor(16)
        ),
        "config": lambda: hf_msn.PAWSConfig(**{**VIT, "image_size": 8}),
    }
    return {
        **(names if page.endswith(".py") else {}),
        **{name: make() for name, make in makers.items() if re.search(rf"\b{name}\b", code)},
        "model": model,
        "optimizer": optimizer,
        "batches": batches,
        "loader": batches,
        "images": images,
        "labelled_rows": list(range(200)),
    }


def run_page(page: str, code: str, folder: Path) -> dict:
    """Run the Python of a page in the folder, and return all names at its end."""
    for written, replacement in REPLACED.items():
        code = code.replace(written, replacement)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = given(page, code)
        exec(compile(code, page, "exec"), names)
    return names


def write_files(folder: Path) -> Path:
    """Write what pages name: images, and trained encoders."""
    write_color_images(folder / "images")
    for place in TRAINED:
        shutil.copytree(ENCODER, folder / place)
    for name, color in {"cat_1": "red", "cat_2": "red", "dog_1": "blue", "dog_2": "blue", "what": "blue"}.items():
        Image.new("RGB", (20, 20), COLORS[color]).save(folder / f"{name}.jpg")
    return folder


def run_on_rank(rank, pages, folders) -> dict[str, list[torch.Tensor]]:
    """Return the parameters of the `model` of each page."""
    return {page: list(run_page(page, code, folders[page])["model"].parameters()) for page, code in pages.items()}


@pytest.mark.slow
def test_python_of_pages_and_docstrings_runs(tmp_path):
    for page, code in snippets().items():
        if not on_ranks(page):
            run_page(page, code, write_files(tmp_path / page))
    assert (tmp_path / "docs/pretraining.md/runs/mine/backbone/model.safetensors").is_file()
    assert (tmp_path / "docs/evaluation.md/report.html").is_file()
    assert (tmp_path / "docs/app.md/classifier.zip").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_python_of_pages_and_docstrings_about_communication_runs_on_two_ranks(tmp_path):
    pages = {page: code for page, code in snippets().items() if on_ranks(page)}
    folders = {page: write_files(tmp_path / page) for page in pages}
    first, second = run_ranks(run_on_rank, 2, pages, folders, timeout=200)
    assert all(map(torch.equal, first["docs/communication.md"], second["docs/communication.md"]))


def test_all_pages_with_python_are_found():
    whole = "\n".join(snippets().values())
    assert {"README.md", "docs/publishing.md", "hf_msn/distributed/local_update.py"} <= set(snippets())
    assert len(snippets()) >= 20 and all(written in whole for written in REPLACED)
