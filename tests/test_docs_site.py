"""The documentation site: it builds without a warning, and has all public names, recipes and papers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the oldest versions are tested without the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.slow
def test_all_public_names_have_an_entry(site):
    names = set(re.findall(r"import \w+ as (\w+)|^    \w+ as (\w+)", (ROOT / "hf_msn/__init__.pyi").read_text(), re.M))
    wanted = {f"hf_msn.{first or second}" for first, second in names}
    found = {name for page in site.glob("api/*/index.html") for name in re.findall(r'id="([\w.]+)"', page.read_text())}
    assert len(wanted) > 90 and wanted <= found


@pytest.mark.slow
def test_all_recipes_are_shown(site):
    page = (site / "recipes" / "index.html").read_text()
    for path in (ROOT / "hf_msn" / "cli" / "recipes").glob("*.yaml"):
        assert f'id="{path.stem}"' in page and f'href="#{path.stem}"><code>' in page  # its section, and its row
    assert "67.2 % with 1 % of the labels" in page.split("<h2")[0]  # in the table above all recipes


@pytest.mark.slow
def test_notebooks_are_shown_and_can_be_downloaded(site):
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / path.stem / "index.html").read_text()
        assert f'href="../{path.name}"' in page and "hf_msn" in page and (site / "notebooks" / path.name).is_file()


@pytest.mark.slow
def test_docstrings_are_rendered(site):
    page = (site / "api" / "data" / "index.html").read_text()
    assert "[`" not in page and "*optional*" not in page and "Args:" not in page
    assert 'href="#hf_msn.MultiViewTransform"' in page  # a reference in a docstring


def test_all_papers_are_listed():
    listed = (ROOT / "docs" / "papers.md").read_text()
    named = {
        paper for path in (ROOT / "hf_msn").rglob("*.py") for paper in re.findall(r"\d{4}\.\d{5}", path.read_text())
    }
    assert len(named) > 20 and {paper for paper in named if f"abs/{paper}" not in listed} == set()


def test_each_method_page_shows_a_picture_that_the_script_draws(tmp_path):
    code = "import sys, pathlib, method_figures as m; m.FOLDER = pathlib.Path(sys.argv[1]); m.main()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT / "scripts", check=True, timeout=100)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    pages = {path.name: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    shown = {name for text in pages.values() for name in re.findall(r"\]\((\w+\.svg)\)", text)}
    assert drawn == {path.name: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.svg")}
    assert shown == set(drawn)
    assert all(len(text.splitlines()) < 80 for text in pages.values())
