"""The picture of docs/design.md: which parts of hf_msn import which, read from the code as tests/test_layers.py does.

python scripts/layers.py
"""

import argparse
import ast
import re
from pathlib import Path

from method_figures import BLUE, GRAY, flow

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "layers.svg"
# Parts by layer, from the list of docs/design.md: files and folders of hf_msn.
LAYERS = {
    name: int(layer)
    for layer, name in re.findall(
        r"^ (\d) (\w+)(?:\.py|/)", (ROOT / "docs" / "design.md").read_text().split("```")[1], flags=re.MULTILINE
    )
}


def module_of(path: str) -> tuple[tuple[str, ...], bool]:
    """Return the dotted name of a file, split at the dots, and whether it is a package."""
    parts = Path(path).with_suffix("").parts
    return (parts[:-1], True) if parts[-1] == "__init__" else (parts, False)


def imported_modules(path: str, source: str) -> set[tuple[str, ...]]:
    """Return what a file imports, also in functions and under TYPE_CHECKING: `module` or `module.name`, split."""
    module, is_package = module_of(path)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module[:-1]
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return found


def package_sources() -> dict[str, str]:
    """Return the files of hf_msn by their paths in the repository."""
    return {str(file.relative_to(ROOT)): file.read_text() for file in sorted((ROOT / "hf_msn").rglob("*.py"))}


def imports_of_parts(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return which parts each part imports, without those that one of these imports too."""
    direct: dict[str, set[str]] = {part: set() for part in LAYERS}
    for path, source in sources.items():
        part = module_of(path)[0][1:2]
        for target in imported_modules(path, source):
            if part and target[0] == "hf_msn" and target[1:2] != part and target[1] in LAYERS:
                direct[part[0]].add(target[1])

    def reached(part: str) -> set[str]:
        return direct[part].union(*(reached(other) for other in direct[part]))

    return {part: found - set().union(*(reached(other) for other in found)) for part, found in direct.items()}


def draw() -> str:
    """Return the picture: a row for each layer, an arrow from each part to what it imports."""
    boxes = {}
    widest = max(list(LAYERS.values()).count(layer) for layer in LAYERS.values())
    for part, layer in LAYERS.items():
        row = [name for name, of in LAYERS.items() if of == layer]
        column = row.index(part) + (widest - len(row)) / 2
        boxes[part] = (column, -layer, part, BLUE if (ROOT / "hf_msn" / part).is_dir() else GRAY)
    arrows = [(part, other) for part, found in imports_of_parts(package_sources()).items() for other in sorted(found)]
    return flow(boxes, arrows, [])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    PICTURE.write_text(draw())
