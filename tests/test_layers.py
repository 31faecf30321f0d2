"""The layers of docs/design.md, import circles, and what importing a public name loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from layers import LAYERS, PICTURE, draw, imported_modules, imports_of_parts, module_of, package_sources  # noqa: E402

OPENS_A_PROCESS_GROUP = {"init_process_group", "init_device_mesh", "new_group", "new_subgroups", "split_group"}
MAKES_SUBGROUPS = "hf_msn/distributed/subgroups.py"  # subgroups of a given group, and nowhere else


def layer_faults(path: str, source: str) -> list[str]:
    """Return what breaks the layers in a file of hf_msn. `path` is relative to the repository."""
    module, _ = module_of(path)
    faults = []
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)
        if name in OPENS_A_PROCESS_GROUP and not (path == MAKES_SUBGROUPS and name == "new_group"):
            faults.append(f"{path}: uses {name}, but process groups are passed in, never opened")
    if module == ("hf_msn",):
        return faults
    unit = module[1]
    if unit not in LAYERS:
        return [*faults, f"{path}: '{unit}' has no layer in docs/design.md"]
    for target in imported_modules(path, source):
        if target[0] != "hf_msn":
            continue
        other = target[1] if len(target) > 1 else None
        if other not in LAYERS:
            faults.append(f"{path}: imports {'.'.join(target)}, which has no layer")
        elif other != unit and LAYERS[other] >= LAYERS[unit]:
            faults.append(f"{path}: {unit} (layer {LAYERS[unit]}) imports {other} (layer {LAYERS[other]})")
    return faults


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return which files of the package each file imports. Keys of `sources` are paths."""
    files = {module_of(path)[0]: path for path in sources}
    graph = {}
    for path, source in sources.items():
        targets = imported_modules(path, source)
        graph[path] = {files[t] if t in files else files[t[:-1]] for t in targets if t in files or t[:-1] in files}
        graph[path].discard(path)
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the files of one import circle, or an empty list."""
    done, path = set(), []

    def visit(file: str) -> list[str]:
        if file in path:
            return path[path.index(file) :]
        if file in done:
            return []
        path.append(file)
        for other in sorted(graph[file]):
            if circle := visit(other):
                return circle
        path.pop()
        done.add(file)
        return []

    for file in sorted(graph):
        if circle := visit(file):
            return circle
    return []


def test_every_file_imports_only_from_layers_above_its_own():
    faults = [fault for path, source in package_sources().items() for fault in layer_faults(path, source)]
    assert not faults, "\n".join(faults)


def test_the_picture_is_that_of_the_code():
    assert draw() == PICTURE.read_text(), "python scripts/layers.py"


def test_the_picture_leaves_out_what_follows():
    sources = {
        "hf_msn/cli/a.py": "from ..data.b import x\nfrom hf_msn import files",
        "hf_msn/data/b.py": "def late():\n    from .. import files, checks",
    }
    found = {part: others for part, others in imports_of_parts(sources).items() if others}
    assert found == {"cli": {"data"}, "data": {"files", "checks"}}


def test_no_import_circle():
    graph = import_graph(package_sources())
    assert len(graph) > 50
    assert find_circle(graph) == []


def test_a_circle_is_found():
    sources = {
        "hf_msn/a.py": "from .b import x",
        "hf_msn/b.py": "def late():\n    from . import c",
        "hf_msn/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import y",
        "hf_msn/d.py": "from .a import y",
    }
    assert sorted(find_circle(import_graph(sources))) == ["hf_msn/a.py", "hf_msn/b.py", "hf_msn/c.py"]
    assert find_circle(import_graph({**sources, "hf_msn/c.py": ""})) == []


def test_no_file_is_a_drawer_for_everything():
    names = {path.stem for folder in ("hf_msn", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "misc", "common", "helpers"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hf_msn/losses/msn.py", "from ..models.heads import ProjectionHead"),
        ("hf_msn/losses/msn.py", "from .. import models"),
        ("hf_msn/losses/msn.py", "from hf_msn import msn_loss"),
        ("hf_msn/losses/msn.py", "def late():\n    from ..models import heads"),
        ("hf_msn/distributed/comm/mailbox.py", "from ...losses.msn import msn_loss"),
        ("hf_msn/schedules.py", "from .losses import msn_loss"),
        ("hf_msn/unknown.py", "import torch"),
        ("hf_msn/distributed/local_update.py", "import torch.distributed as dist\ndist.init_process_group('gloo')"),
        ("hf_msn/__init__.py", "import torch\ntorch.distributed.new_group([0])"),
    ],
)
def test_a_broken_layer_is_found(path, source):
    assert len(layer_faults(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hf_msn/losses/msn.py", "from ..distributed.collectives import rank\nfrom .sinkhorn import sinkhorn"),
        ("hf_msn/trainers/msn_trainer.py", "from ..models import heads\nimport transformers.trainers"),
        ("hf_msn/losses/msn.py", "import torch.distributed as dist\ndist.all_reduce(x, group=group)"),
    ],
)
def test_a_kept_layer_is_let_through(path, source):
    assert layer_faults(path, source) == []


HEAVY = {"transformers", "accelerate", "datasets", "timm", "sklearn", "pandas", "torchvision", "evaluate", "numba"}


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import hf_msn", {*HEAVY, "torch"}),
        ("from hf_msn import SlowMo, Gossip, AsyncGossip, Codistillation, RingTopology, msn_loss, paws_loss", HEAVY),
    ],
)
def test_a_public_name_loads_only_what_it_needs(statement, forbidden):
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not forbidden & set(loaded.stdout.split())


def test_every_public_name_can_be_imported():
    import hf_msn

    assert len(hf_msn.__all__) > 60
    for name in hf_msn.__all__:
        assert getattr(hf_msn, name) is not None
