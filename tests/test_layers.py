"""Holds the layers: a file of hf_msn imports only from layers above its own, a script only from `hf_msn` itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file or package of hf_msn imports itself and what has a smaller number. The package's own __init__ is free.
LAYERS = {
    "schedules": 0,
    "privacy": 0,
    "distributed": 0,
    "losses": 1,
    "optim": 1,
    "data": 1,
    "models": 2,
    "evaluation": 3,
    "hub": 4,
    "callbacks": 5,
    "trainers": 6,
    "recipe_arguments": 7,
    "recipe_sync": 7,
    "recipe_forms": 7,
    "finetuning": 8,
    "recipes": 8,
    "recipe_parsing": 9,
}
OPENS_A_PROCESS_GROUP = {"init_process_group", "init_device_mesh", "new_group", "new_subgroups", "split_group"}

MAKES_SUBGROUPS = "hf_msn/distributed/subgroups.py"  # of a group that is given to us; nowhere else


def imported_modules(tree: ast.AST, module: tuple[str, ...], is_package: bool) -> list[tuple[str, ...]]:
    """Absolute names of all that is imported anywhere in a file, split at the dots."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module[:-1]
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from ..losses import msn` may import a module or a name of one: both begin with the same unit.
            found += [(*base, alias.name) for alias in node.names]
    return found


def faults_of_package_file(path: str, source: str) -> list[str]:
    """What breaks the layers in a file of hf_msn. `path` is relative to the repository."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = parts[:-1] if is_package else parts
    tree = ast.parse(source)
    faults = []
    for node in ast.walk(tree):
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)
        if name in OPENS_A_PROCESS_GROUP and not (path == MAKES_SUBGROUPS and name == "new_group"):
            faults.append(f"{path}: uses {name}, but a process group is given to us, never opened")
    if module == ("hf_msn",):
        return faults

    unit = module[1]
    if unit not in LAYERS:
        return [*faults, f"{path}: '{unit}' has no layer"]
    for target in imported_modules(tree, module, is_package):
        if target[0] != "hf_msn":
            continue
        other = target[1] if len(target) > 1 else None
        if other not in LAYERS:
            faults.append(f"{path}: imports {'.'.join(target)}, which is no unit with a layer")
        elif other != unit and LAYERS[other] >= LAYERS[unit]:
            faults.append(f"{path}: {unit} (layer {LAYERS[unit]}) imports {other} (layer {LAYERS[other]})")
    return faults


def faults_of_script(path: str, source: str) -> list[str]:
    """What a script imports of ours in another way than `from hf_msn import ...`."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "hf_msn"]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "hf_msn":
            public = node.module == "hf_msn" and not any(alias.name in {*LAYERS, "*"} for alias in node.names)
            names = [] if public else [node.module]
        else:
            continue
        faults += [
            f"{path}: imports {name}, but scripts import only names by `from hf_msn import ...`" for name in names
        ]
    return faults


def test_every_file_imports_only_from_layers_above_its_own():
    files = sorted((ROOT / "hf_msn").rglob("*.py"))
    assert len(files) > 20
    faults = [
        fault for file in files for fault in faults_of_package_file(str(file.relative_to(ROOT)), file.read_text())
    ]
    assert not faults, "\n".join(faults)


def test_scripts_import_only_from_the_package_itself():
    files = sorted((ROOT / "scripts").rglob("*.py"))
    assert files
    faults = [fault for file in files for fault in faults_of_script(str(file.relative_to(ROOT)), file.read_text())]
    assert not faults, "\n".join(faults)


def test_no_file_is_a_drawer_for_everything():
    names = {path.stem for folder in ("hf_msn", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "misc", "common", "helpers"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hf_msn/losses/msn.py", "from ..models.heads import ProjectionHead"),
        ("hf_msn/losses/msn.py", "from .. import models"),
        ("hf_msn/losses/msn.py", "import hf_msn.models.heads as heads"),
        ("hf_msn/losses/msn.py", "from hf_msn.trainers import MSNTrainer"),
        ("hf_msn/losses/msn.py", "from hf_msn import msn_loss"),
        ("hf_msn/losses/msn.py", "import hf_msn"),
        ("hf_msn/losses/msn.py", "def late():\n    from ..models import heads"),
        ("hf_msn/losses/msn.py", "from ..data import sources"),
        ("hf_msn/losses/__init__.py", "from ..models import heads"),
        ("hf_msn/distributed/collectives.py", "from ..schedules import linear"),
        ("hf_msn/schedules.py", "from .losses import msn_loss"),
        ("hf_msn/callbacks.py", "from .trainers.msn_trainer import MSNTrainer"),
        ("hf_msn/utils.py", "import torch"),
        ("hf_msn/losses/deep/er.py", "from ...models import heads"),
        ("hf_msn/distributed/local_update.py", "import torch.distributed as dist\ndist.init_process_group('gloo')"),
        ("hf_msn/distributed/local_update.py", "from torch.distributed import new_group"),
        ("hf_msn/distributed/subgroups.py", "import torch\ntorch.distributed.init_process_group('gloo')"),
        ("hf_msn/__init__.py", "import torch\ntorch.distributed.new_group([0])"),
    ],
)
def test_a_broken_layer_is_found_in_the_package(path, source):
    assert len(faults_of_package_file(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hf_msn/__init__.py", "from .trainers import MSNTrainer\nfrom .losses import msn_loss"),
        ("hf_msn/losses/__init__.py", "from .msn import msn_loss"),
        ("hf_msn/losses/msn.py", "from ..distributed.collectives import rank\nfrom .assignments import sharpen"),
        ("hf_msn/losses/msn.py", "from ..distributed import collectives\nfrom .. import schedules"),
        ("hf_msn/callbacks.py", "from .evaluation.low_shot import LowShotEvaluator\nimport transformers.trainers"),
        ("hf_msn/trainers/msn_trainer.py", "import hf_msn.models.heads\nfrom ..callbacks import LowShotCallback"),
        ("hf_msn/losses/msn.py", "import torch.distributed as dist\ndist.all_reduce(x, group=group)"),
    ],
)
def test_what_keeps_the_layers_is_let_through(path, source):
    assert faults_of_package_file(path, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "from hf_msn.models import MSNConfig",
        "import hf_msn",
        "import hf_msn.models as models",
        "from hf_msn import models",
        "from hf_msn import *",
        "def late():\n    from hf_msn.data.sources import load_images",
    ],
)
def test_a_script_that_reaches_into_the_package_is_found(source):
    assert len(faults_of_script("scripts/pretrain.py", source)) == 1


def test_a_script_that_imports_public_names_is_let_through():
    assert faults_of_script("scripts/pretrain.py", "import torch\nfrom hf_msn import MSNConfig, MSNTrainer") == []
