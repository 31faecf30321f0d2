"""The installed package: the wheel has the files that are not Python, and its metadata agree with the repository's."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_has_all_files_of_the_package(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "hf_msn", tmp_path / "hf_msn", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", build, "dist"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hf_msn/")}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_msn").rglob("*") if path.is_file()}
    assert packed == {name for name in here if "__pycache__" not in name}
    assert {"hf_msn/py.typed", "hf_msn/cli/recipes/digits.yaml", "hf_msn/cli/help/pretrain_msn.txt"} <= packed


def test_the_citation_has_the_version_of_the_package():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_types_of_all_modules_with_public_names_are_checked():
    listed = set(re.findall(r'"(hf_msn/[\w/.]+)"', (ROOT / "pyproject.toml").read_text()))
    stub = (ROOT / "hf_msn" / "__init__.pyi").read_text()
    modules = {f"hf_msn/{name.replace('.', '/')}.py" for name in re.findall(r"^from \.([\w.]+) import", stub, re.M)}
    assert {name for name in modules if listed.isdisjoint({name, *map(str, Path(name).parents)})} == set()
