"""Diagrams as SVG inside the page: boxes in rows, and arrows down from each row to the next. No script, no network."""

import tomllib
from collections.abc import Sequence
from html import escape
from pathlib import Path

WIDTH, GAP, ARROW, LINE = 420, 10, 22, 16
"""pixels: of a diagram, between boxes, of an arrow, of a line of text"""
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

STEP = (
    ("read|uint8 images (B, C, H, W); ids of image,|class, source and laboratory",),
    ("augment, on the device|V views of each image (V·B, C, S, S),|from seed, step and image alone",),
    ("backbone and head, inside DDP|features (A, F), then rows (A, D)",),
    ("gather|rows and ids of all ranks: references (R, D)",),
    ("loss|this rank's anchors against all references",),
    ("backward, clip, optimizer step|DDP's mean over ranks; the teacher follows",),
    ("log, evaluate, checkpoint|if this step is due",),
)
RANKS = (
    ("rank 0|B images", "rank 1|B images", "rank 2|B images"),
    ("rows (A, D)", "rows (A, D)", "rows (A, D)"),
    ("gather: every rank has all rows (R, D), as numbers|R = 3·A; no gradient flows through the gather",),
    ("loss of rows|of rank 0", "loss of rows|of rank 1", "loss of rows|of rank 2"),
    ("gather: one number a row, the sum of its similarities",),
    ("gradient of|its own rows", "gradient of|its own rows", "gradient of|its own rows"),
    ("DDP: mean over ranks = gradient of one process|on the global batch",),
)
MICRO_BATCHES = (
    ("part 1|no graph", "part 2|no graph", "part 3|no graph"),
    ("rows of the whole batch",),
    ("loss of the global batch, once|and its gradient by each row",),
    ("part 1 again|with graph", "part 2 again|with graph", "part 3 again|with graph"),
    ("gradients of the rows pushed through, and added up|DDP sends them once",),
)
FILES = (
    ("config.yaml|metrics.jsonl, plots/", "checkpoints/step_…|weights, optimizer, SHA-256"),
    ("encoder.safetensors, encoder.json|written last: the run is finished",),
    ("evaluate|report.html", "embed, search|embeddings/", "export|timm, torch, ONNX"),
)


def step() -> str:
    """One step of the training."""
    return drawn(STEP, "One step of the training, from reading images to the checkpoint")


def ranks() -> str:
    """How ranks share a loss."""
    return drawn(RANKS, "Three ranks compute one loss over the global batch")


def micro_batches() -> str:
    """How a batch larger than memory is computed."""
    return drawn(MICRO_BATCHES, "A batch in three parts: rows first, the loss once, then the gradients")


def files() -> str:
    """What of a run's folder is made of what."""
    return drawn(FILES, "What a training writes, and what is made of it")


def floors() -> str:
    """The layers of the package as import-linter holds them."""
    tool = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(c["layers"] for c in tool["contracts"] if c["type"] == "layers")
    rows = [(layer.replace("sslcells.", "").replace(" : ", ", ").replace(" | ", ", "),) for layer in layers]
    return drawn(rows, "The floors of the package: a file imports only from floors below its own", arrows=False)


def drawn(rows: Sequence[Sequence[str]], title: str, arrows: bool = True) -> str:
    """Rows of boxes as one SVG; lines of a box are parted by `|`, and the first is bold."""
    y, parts = 1, [f"<title>{escape(title)}</title>"]
    for number, row in enumerate(rows):
        height = LINE * max(box.count("|") + 1 for box in row) + 12
        width = (WIDTH - 2 - GAP * (len(row) - 1)) / len(row)
        for place, box in enumerate(row):
            parts += _box(1 + place * (width + GAP), y, width, height, box.split("|"))
        y += height
        if number + 1 < len(rows) and arrows:
            parts += _arrows(y, max(len(row), len(rows[number + 1])))
        y += ARROW if arrows else 3
    y -= ARROW if arrows else 3
    head = (
        f'<svg class="diagram" viewBox="0 0 {WIDTH} {y + 1}" role="img" style="max-width: {WIDTH + 60}px; width: 100%"'
    )
    return (
        f'{head} font-family="inherit" font-size="13" text-anchor="middle" fill="currentColor">{"".join(parts)}</svg>'
    )


def _box(x: float, y: float, width: float, height: float, lines: Sequence[str]) -> list[str]:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    out = [f'<rect {place} rx="4" fill="none" stroke="currentColor" stroke-opacity="0.5"/>']
    top = y + (height - LINE * len(lines)) / 2 + 12
    for number, line in enumerate(lines):
        weight = ' font-weight="600"' if number == 0 and len(lines) > 1 else ""
        size = "" if number == 0 else ' font-size="12"'
        out.append(f'<text x="{x + width / 2:.1f}" y="{top + LINE * number:.1f}"{weight}{size}>{escape(line)}</text>')
    return out


def _arrows(y: float, count: int) -> list[str]:
    width = (WIDTH - 2 - GAP * (count - 1)) / count
    out = []
    for place in range(count):
        x = 1 + place * (width + GAP) + width / 2
        out.append(f'<path d="M{x:.1f} {y + 2}v{ARROW - 6}m-4 -5l4 5l4 -5" fill="none" stroke="currentColor"/>')
    return out
