"""Fragments of a model: parameters by name, in parts that are exchanged one after the other."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

_LAYER = re.compile(r".*?\.\d+(?=\.)|\d+(?=\.)")  # up to the first index in a list of modules


def split_parameters(
    sizes: Mapping[str, int], fragments: str | Sequence[Sequence[str]], num_fragments: int
) -> list[list[str]]:
    """Return the names of the parameters of each fragment.

    Args:
        sizes (`Mapping[str, int]`): Bytes of each parameter, by name, in the order of the model.
        fragments (`str` or `Sequence[Sequence[str]]`): "strided", "size" or the names, see [`StreamingDiLoCo`].
        num_fragments (`int`): Number of fragments; of names, their length.

    Raises:
        ValueError: If a fragment would be empty, or names leave a parameter out, are there twice, or are none of it.
    """
    if not isinstance(fragments, str):
        _check_fragments(fragments, sizes)
        return [list(names) for names in fragments]
    layers: dict[str, list[str]] = {}
    for name in sizes:
        found = _LAYER.match(name)
        layers.setdefault(found[0] if found else name.rpartition(".")[0], []).append(name)
    kind, number = ("layers", len(layers)) if fragments == "strided" else ("trainable parameters", len(sizes))
    if number < num_fragments:
        raise ValueError(
            f"Each fragment needs one of the {kind} of the model, but it has {number} and `num_fragments` is "
            f"{num_fragments}. Lower it, or set `fragments` to 'size' or to names."
        )
    if fragments == "size":
        return _by_size(sizes, num_fragments)
    strided = [list(layers.values())[i::num_fragments] for i in range(num_fragments)]
    return [[name for layer in part for name in layer] for part in strided]


def _check_fragments(fragments: Sequence[Sequence[str]], names: Collection[str]) -> None:
    """Raise a `ValueError` unless each name is in one of the fragments."""
    given = Counter(name for fragment in fragments for name in fragment)
    problems = {
        "leaves out": [name for name in names if name not in given],
        "has twice": [name for name, count in given.items() if count > 1],
        "has, though no trainable parameter is called so,": sorted(given.keys() - set(names)),
        "has empty ones": [str(i) for i, fragment in enumerate(fragments) if not fragment],
    }
    for problem, found in problems.items():
        if found:
            more = f" and {len(found) - 3} more" * (len(found) > 3)
            raise ValueError(
                "`fragments` must have each trainable parameter in one fragment, by its name in "
                f"`named_parameters()`, but {problem} {', '.join(found[:3])}{more}."
            )


def _by_size(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Cut the names into `count` runs, of which the largest is as small as can be."""

    def cut(most: int) -> list[list[str]]:
        runs: list[list[str]] = []
        filled = most + 1
        for place, (name, size) in enumerate(sizes.items()):
            # The last ones each get a run, where there would be too few.
            if filled + size > most or len(sizes) - place <= count - len(runs):
                runs.append([])
                filled = 0
            runs[-1].append(name)
            filled += size
        return runs

    low, high = max(sizes.values()), sum(sizes.values())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= count else (middle + 1, high)
    return cut(low)
