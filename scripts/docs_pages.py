"""Pages of the documentation site that are made from the code: a hook of mkdocs, and an extension of griffe.

README becomes the first page; the recipes' comments, the notebooks and the public names become pages of their own, so
that the site cannot fall behind the package.
"""

import ast
import json
import os
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CARD = "model_cards/msn-vit-digits"
# Files outside docs/, and their pages.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "model_cards/README.md": "model_cards.md",
    f"{CARD}/README.md": f"{CARD}/index.md",
}
# Public names by the folder of their module.
AREAS = {
    "models": "Models and configurations",
    "trainers": "Trainers, arguments, callbacks",
    "data": "Images, views, supports",
    "losses": "Losses",
    "distributed": "Little communication",
    "optim": "Optimizers",
    "evaluation": "Evaluation",
    "finetuning": "Fine-tuning",
    "hub": "Publishing and converting",
    "cli": "Recipes",
}


def public_names() -> dict[str, list[str]]:
    """Return the public names of hf_msn by area."""
    names: dict[str, list[str]] = {area: [] for area in AREAS}
    for node in ast.parse((ROOT / "hf_msn" / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            area = (node.module or "").split(".")[0]
            names[area] += [alias.name for alias in node.names]
    return {area: sorted(found, key=str.lower) for area, found in names.items() if found}


def api_page(area: str, names: list[str]) -> str:
    return f"# {AREAS[area]}\n\n" + "\n".join(f"::: hf_msn.{name}\n" for name in names)


def recipes() -> str:
    """Return a table of the recipes' published numbers, and the comment and the settings of each."""
    table, text = "\n| recipe | published | rerun here |\n|---|---|---|\n", ""
    for path in sorted((ROOT / "hf_msn" / "cli" / "recipes").glob("*.yaml")):
        whole = path.read_text()
        numbers = [re.search(rf"^# {name}: (.+)\.$", whole, re.MULTILINE)[1] for name in ("Published", "Rerun here")]
        table += f"| [`{path.stem}`](#{path.stem}) | {' | '.join(numbers)} |\n"
        comment = whole.split("\n\n# data")[0] if "\n\n# data" in whole else re.match(r"(#.*\n)*", whole)[0]
        lines = [re.sub(r"^# ?", "", line) for line in comment.splitlines()]
        text += f"\n## {path.stem}\n\n" + "\n".join(_fence_commands(lines)) + "\n\n"
        text += '??? note "Settings"\n\n' + "".join(
            f"    {line}\n" for line in ["```yaml", *whole.splitlines(), "```"]
        )
    return table + text


def _fence_commands(lines: list[str]) -> list[str]:
    """Put commands, which may go on after a backslash, into code blocks."""
    fenced, is_command = [], False
    for line in lines:
        starts = line.startswith(("hf-msn ", "accelerate launch "))
        fenced += (["```bash"] if starts else []) + [line]
        is_command = starts or is_command
        if is_command and not line.endswith("\\"):
            fenced.append("```")
            is_command = False
    return fenced


def notebook_page(path: Path) -> str:
    """Return a notebook as Markdown: its text and its code, and a link to the file. Its outputs are not kept."""
    text = ""
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        text += f"```python\n{source}\n```\n\n" if cell["cell_type"] == "code" else f"{source}\n\n"
    title, rest = text.split("\n", 1)
    return f"{title}\n\n[Download the notebook]({path.name}).\n{rest}"


def page_of(path: str) -> str:
    """Return the place in the site of a file of the repository."""
    return OUTSIDE.get(path, path.removeprefix("docs/"))


def adapt_links(text: str, source: str) -> str:
    """Let the links of a file of the repository lead to the pages of the site."""

    def adapted(match: re.Match) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(source), match[1]))
        return f"]({os.path.relpath(page_of(path), os.path.dirname(page_of(source)) or '.')}{match[2] or ''})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", adapted, text)


def on_files(files: Files, config) -> Files:
    """Add the pages that are made."""
    pages = {page: adapt_links((ROOT / source).read_text(), source) for source, page in OUTSIDE.items()}
    pages[f"{CARD}/index.md"] = re.sub(r"\A---\n.*?\n---\n", "", pages[f"{CARD}/index.md"], flags=re.DOTALL)
    pages |= {f"api/{area}.md": api_page(area, names) for area, names in public_names().items()}
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        pages[f"notebooks/{path.stem}.md"] = notebook_page(path)
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    for path in (ROOT / CARD).rglob("*"):
        if path.is_file() and path.suffix in (".png", ".json"):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Let links that leave docs/ lead to the pages of the site, and add the recipes to their page."""
    if page.file.src_uri == "recipes.md":
        markdown += recipes()
    if page.file.generated_by is not None:
        return markdown
    return adapt_links(markdown, f"docs/{page.file.src_uri}")


class References(griffe.Extension):
    """Make [`Name`] in a docstring a link if the name is public, and code if not; show types without markup."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^( +[\w, ]+) \((.+?)\):(?= |$)", _plain_type, obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"\[`~?([\w.]+)`\](?!\()", _reference, text)


def _plain_type(match: re.Match) -> str:
    """Return "name (type):" without markup and default, which the signature shows."""
    plain = re.sub(r"\[`~?([\w.]+)`\]", r"\1", match[2])
    plain = re.sub(r", defaults to `[^`]*`|[`]", "", plain).replace("*optional*", "optional")
    return f"{match[1]} ({plain}):"


_PUBLIC = {name for names in public_names().values() for name in names}


def _reference(match: re.Match) -> str:
    return f"[`{match[1]}`][hf_msn.{match[1]}]" if match[1] in _PUBLIC else f"`{match[1]}`"
