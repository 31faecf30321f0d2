"""The pictures of docs/methods/: how data flow in a pretraining method, and which ranks wait for which in training.

python scripts/method_figures.py
"""

import argparse
from html import escape
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
BLUE, ORANGE, GRAY, GREEN = "#0b6e99", "#d9822b", "#6b6b6b", "#2e8b57"
COLUMN, ROW = 165, 84  # of boxes, in pixels
STEP, RANK = 70, 24  # of a timeline
LINE, CHARACTER = 14, 6  # of text

# Boxes by name: (column, row, text, color). Arrows through several boxes, dashed where no gradient goes.
FLOWS = {
    "msn": (
        {
            "image": (0, 0.5, "image", GRAY),
            "target": (1, 1, "target view", ORANGE),
            "anchor": (1, 0, "anchors: patches\ndropped, small crops", BLUE),
            "average": (2, 1, "encoder, head:\nmoving average", ORANGE),
            "network": (2, 0, "encoder, head", BLUE),
            "prototypes": (3, 0.5, "K prototypes", GREEN),
            "sharp": (4, 1, "target p,\nsharpened", ORANGE),
            "p": (4, 0, "p of each anchor", BLUE),
            "loss": (5, 0.5, "cross-entropy\n- entropy of mean p", GRAY),
        },
        [("image", "anchor", "network", "p", "loss"), ("prototypes", "p")],
        [("image", "target", "average", "sharp", "loss"), ("prototypes", "sharp")],
    ),
    "paws": (
        {
            "image": (0, 1, "image", GRAY),
            "support": (0, 0, "labelled images", GREEN),
            "views": (1, 1, "two large views,\nsmall crops", BLUE),
            "support views": (1, 0, "views of the support", GREEN),
            "network": (2, 0.5, "encoder, heads", BLUE),
            "neighbours": (3, 0.5, "similarity to the\nsupport, times labels", BLUE),
            "p": (4, 0, "p of a view", BLUE),
            "sharp": (4, 1, "p of the other\nview, sharpened", ORANGE),
            "loss": (5, 0.5, "cross-entropy\n- entropy of mean p", GRAY),
        },
        [("image", "views", "network", "neighbours", "p", "loss"), ("support", "support views", "network")],
        [("neighbours", "sharp", "loss")],
    ),
    "suncet": (
        {
            "image": (0, 1, "images", GRAY),
            "labelled": (0, 0, "labelled images", GREEN),
            "views": (1, 1, "two views", BLUE),
            "support": (1, 0, "views", GREEN),
            "network": (2, 0.5, "encoder, head", BLUE),
            "simclr": (3, 1, "find the other view\namong all views", BLUE),
            "suncet": (3, 0, "find the own class\namong labelled views", GREEN),
            "loss": (4, 0.5, "NT-Xent + SuNCEt", GRAY),
        },
        [("image", "views", "network", "simclr", "loss"), ("labelled", "support", "network", "suncet", "loss")],
        [],
    ),
    "byol": (
        {
            "image": (0, 0.5, "image", GRAY),
            "one": (1, 0, "one view", BLUE),
            "other": (1, 1, "the other view", ORANGE),
            "network": (2, 0, "encoder, head", BLUE),
            "average": (2, 1, "moving average (BYOL)\nor itself (SimSiam)", ORANGE),
            "predictor": (3, 0, "predictor: trained,\nor set from F", GREEN),
            "loss": (4, 0.5, "2 - 2 cos,\nboth ways", GRAY),
        },
        [("image", "one", "network", "predictor", "loss")],
        [("image", "other", "average", "loss")],
    ),
}

# Rows of a timeline: per rank (start, length) of computing in steps; exchanges (time, rank, time of use, other rank).
_STEPS = [(float(step), 0.9) for step in range(8)]
_MEANS = [(time, rank, time + 0.45, other) for time in (3.9, 8.35) for rank in range(4) for other in range(4)]
_PERIODS = [(step + 0.45 * (step >= 4), 0.9) for step in range(8)]
_WAITING = [(1.35 * step, 0.9) for step in range(6)]
TIMELINES = {
    "local_sgd": ("mean of the parameters every 4 steps", [_PERIODS] * 4, _MEANS),
    "slowmo": ("mean of the parameters, then a step of slow momentum, every 4 steps", [_PERIODS] * 4, _MEANS),
    "diloco": ("mean of the changes, then a step of the outer optimizer, every 4 steps", [_PERIODS] * 4, _MEANS),
    "streaming_diloco": (
        "one fragment of the parameters every 2 steps: sent in the background, applied one step later",
        [_STEPS] * 4,
        [(step + 0.9, rank, step + 1.9, other) for step in (1, 3, 5) for rank in range(4) for other in range(4)],
    ),
    "noloco": (
        "an outer step with one random rank every 3 steps: only the two of a pair wait for each other",
        [
            *[[(start + step, 0.9) for start in (0, 3.4) for step in range(3)]] * 2,
            [(start + step, 0.9) for start in (0, 4.3) for step in range(3)],
            [(start + 1.3 * step, 1.2) for start in (0, 4.3) for step in range(3)],
        ],
        [
            (time, rank, time + 0.45, other)
            for time, pair in ((2.9, (0, 1)), (3.8, (2, 3)), (7.2, (0, 2)), (8.1, (1, 3)))
            for rank, other in (pair, pair[::-1])
        ],
    ),
    "gossip": {
        "Gossip: one peer after every step": (
            [_WAITING] * 4,
            [(1.35 * s + 0.9, r, 1.35 * (s + 1), (r + 2 ** (s % 2)) % 4) for s in range(6) for r in range(4)],
        ),
        "OverlapGossip: sent without waiting, used one step later": (
            [_STEPS] * 4,
            [(s + 0.9, r, s + 1.9, (r + 2 ** (s % 2)) % 4) for s in range(0, 7) for r in range(4)],
        ),
        "AsyncGossip: rank 3 is slow, nobody waits": (
            [_STEPS, _STEPS, _STEPS, [(2.7 * step, 2.6) for step in range(3)]],
            [
                (0.9, 0, 1.6, 1),
                (1.9, 1, 2.6, 2),
                (2.9, 2, 3.6, 0),
                (2.6, 3, 3.4, 1),
                (4.9, 1, 5.5, 2),
                (5.3, 3, 6.1, 0),
            ],
        ),
    },
    "codistillation": (
        "predictions on the same batch at every step, or checkpoints now and then; no parameter is averaged",
        [_STEPS] * 2,
        [(s + 0.45, rank, s + 0.75, 1 - rank) for s in range(8) for rank in range(2)],
    ),
}


def flow(boxes: dict[str, tuple], arrows: list[tuple], without_gradient: list[tuple]) -> str:
    frames, below, shapes = {}, [], []
    rows = [row for _, row, *_ in boxes.values()]
    for name, (column, row, text, color) in boxes.items():
        lines = text.split("\n")
        width, height = CHARACTER * max(map(len, lines)) + 14, LINE * len(lines) + 12
        x, y = COLUMN * (column + 0.5), ROW * (max(rows) - row) + 32
        frames[name] = (x, y, width / 2, height / 2)
        frame = f'width="{width}" height="{height}" rx="6" fill="white" stroke="{color}"'
        shapes.append(f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" {frame}/>')
        for number, line in enumerate(lines):
            down = LINE * (number - len(lines) / 2 + 0.8)
            shapes.append(
                f'<text x="{x:g}" y="{y + down:g}" text-anchor="middle" fill="{color}">{escape(line)}</text>'
            )
    for ways, style in ((arrows, ""), (without_gradient, ' stroke-dasharray="4 3"')):
        for start, end in (pair for way in ways for pair in pairwise(way)):
            ends = *_border(frames[start], frames[end]), *_border(frames[end], frames[start])
            below.append(_arrow(*ends, style))
    width = COLUMN * (1 + max(column for column, *_ in boxes.values()))
    return _svg(width, ROW * (max(rows) - min(rows)) + 64, GRAY, below + shapes)


def _border(frame: tuple, toward: tuple) -> tuple[float, float]:
    """Return where the line between the middles of two boxes leaves the first."""
    (x, y, half_width, half_height), dx, dy = frame, toward[0] - frame[0], toward[1] - frame[1]
    part = min(half / abs(way) for half, way in ((half_width, dx), (half_height, dy)) if way)
    return x + part * dx, y + part * dy


def timeline(panels: dict[str, tuple]) -> str:
    shapes, top, end = [], 0, 0.0
    for title, (ranks, exchanges) in panels.items():
        shapes.append(f'<text x="60" y="{top + 18}">{escape(title)}</text>')
        rows = [top + 40 + RANK * rank for rank in range(len(ranks))]
        for rank, (y, steps) in enumerate(zip(rows, ranks)):
            shapes.append(f'<text x="8" y="{y + 4}">rank {rank}</text>')
            bars = "".join(
                f"M{60 + STEP * start:g} {y - 7}h{STEP * length:g}v14h-{STEP * length:g}z" for start, length in steps
            )
            shapes.append(f'<path d="{bars}" fill="{BLUE}" opacity="0.75"/>')
        for start, rank, stop, other in exchanges:
            if rank != other:
                shapes.append(_arrow(60 + STEP * start, rows[rank], 60 + STEP * stop, rows[other]))
        top = rows[-1] + 20
        ends = [start + length for steps in ranks for start, length in steps]
        end = max(end, *ends, *(stop for _, _, stop, _ in exchanges))
    shapes.append(f'<text x="60" y="{top + 12}" font-size="10">time; a bar is an optimizer step</text>')
    return _svg(70 + STEP * end, top + 20, ORANGE, shapes)


def _arrow(x: float, y: float, to_x: float, to_y: float, style: str = "") -> str:
    return f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" class="arrow"{style}/>'


def _svg(width: float, height: float, color: str, shapes: list[str]) -> str:
    """Return a picture whose arrows have one colour."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        'font-family="sans-serif" font-size="11">',
        f"<style>.arrow {{stroke: {color}; fill: none; marker-end: url(#head)}}</style>",
        '<marker id="head" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0L6 3L0 6z" fill="{color}"/></marker>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    return "\n".join([*lines, *shapes, "</svg>", ""])


def main() -> None:
    figures = {name: flow(*parts) for name, parts in FLOWS.items()}
    for name, parts in TIMELINES.items():
        figures[name] = timeline(parts if isinstance(parts, dict) else {parts[0]: parts[1:]})
    for name, figure in figures.items():
        (FOLDER / f"{name}.svg").write_text(figure)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
