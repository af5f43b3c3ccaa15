"""Draws the documents' pictures, SVG that suits light and dark pages. Run it from anywhere; it writes beside itself."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

Lines = tuple[str, str]  # of a box: what it is, and a few words on it
BOX, GAP, MARGIN = (170, 52), 18, 20
NARROW, BETWEEN, EDGE = (130, 68), 22, 6  # five in a row, at a size that is read on a page 700 pixels wide
LETTERS = 20  # of small text that fit into a narrow box
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
.title { font-weight: 600; font-size: 14px } .small { font-size: 11px; fill: #59636e }
rect { fill: #f6f8fa; stroke: #d1d9e0 } .made { fill: #ddf4e4; stroke: #4ac26b } path { stroke: #59636e; fill: none }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 } rect { fill: #151b23; stroke: #3d444d }
  .made { fill: #12261e; stroke: #2ea043 } path { stroke: #9198a1 }
}
"""
OVERVIEW: tuple[tuple[str, tuple[Lines, ...]], ...] = (
    ("you have", (("Hugging Face", "checkpoint"), ("Medusa heads", "any layout, or train them"), ("prompts", "like your users'"))),
    ("medusa-export", (("quantize", "ModelOpt"), ("choose the tree", "measured"), ("verify", "every number"))),
    ("it writes", (("TensorRT-LLM", "checkpoint, engine"), ("ONNX graphs", "TensorRT engines"), ("ONNX Runtime", "engine"))),
    ("you run", (("medusa-run", "speed-up and parity"), ("medusa-serve", "OpenAI's protocol"), ("Triton", "model repository"))),
)  # fmt: skip
CHAINS: dict[str, tuple[str, tuple[Lines, ...]]] = {
    "tensor": (
        "The way of a tensor",
        (("TensorSource", "rows of base and heads"), ("TensorPlan", "name, slice, kind, dtype"),
         ("TensorMaker", "rows and scales to codes"), ("rank0.safetensors", "appended by chunks"),
         ("Comparison", "with the source, in one pass")),
    ),
    "step": (
        "The way of a decode step",
        (("draft", "node_ids [B, N]"), ("verify", "one run of the base"), ("accept", "the base's own path"),
         ("commit", "accepted rows of the cache"), ("tokens", "1 to depth + 1 of each")),
    ),
    "request": (
        "The way of a request",
        (("HTTP or gRPC", "JSON, tensors"), ("encode", "chat template, input_ids"), ("queue", "bounded"),
         ("scheduler", "prefill parts, steps of all"), ("text stream", "whole characters, events")),
    ),
}  # fmt: skip


def main() -> None:
    """Write every picture."""
    here = Path(__file__).parent
    (here / "overview.svg").write_text(overview(), encoding="utf-8")
    (here / "packages.svg").write_text(packages(), encoding="utf-8")
    for name, (title, boxes) in CHAINS.items():
        (here / f"{name}.svg").write_text(chain(title, boxes), encoding="utf-8")


def overview() -> str:
    """Columns of three boxes with an arrow from each to the next."""
    step, parts = BOX[0] + 46, []
    for number, (title, boxes) in enumerate(OVERVIEW):
        left = MARGIN + number * step
        parts.append(f'<text class="title" x="{left + BOX[0] / 2:g}" y="34">{escape(title)}</text>')
        for row, lines in enumerate(boxes):
            parts += _box(left, 56 + row * (BOX[1] + GAP), lines, made=number == 2)
        if number:
            parts.append(_arrow(left - step + BOX[0], left, 152))
    return _svg("Checkpoint and heads in; formats, engines and servers out", 2 * MARGIN + 3 * step + BOX[0], 264, parts)


def chain(title: str, boxes: Sequence[Lines]) -> str:
    """Boxes in a row."""
    (width, height), parts = NARROW, []
    step = width + BETWEEN
    for number, lines in enumerate(boxes):
        left = EDGE + number * step
        parts += _box(left, EDGE, lines, NARROW)
        if number:
            parts.append(_arrow(left - BETWEEN, left, EDGE + height / 2))
    return _svg(title, 2 * EDGE + (len(boxes) - 1) * step + width, 2 * EDGE + height, parts)


def packages() -> str:
    """What is imported stands left of what imports it."""
    places: dict[str, tuple[int, int, str]] = {
        "core": (0, 1, "errors, files, text"),
        "heads": (1, 1, "checkpoints, trees, training"),
        "quantize": (2, 0, "scales"),
        "exporter": (3, 0, "writes and verifies"),
        "engines": (3, 2, "run, measure, serve"),
        "exporter/cli": (4, 1, "the commands"),
    }
    arrows = (
        ("core", "heads"),
        ("heads", "quantize"),
        ("quantize", "exporter"),
        ("heads", "engines"),
        ("exporter", "exporter/cli"),
        ("engines", "exporter/cli"),
    )
    width, height = NARROW
    step, row = width + BETWEEN, height / 2 + 14
    corner = {name: (EDGE + x * step, EDGE + y * row) for name, (x, y, _) in places.items()}
    parts = [part for name, (_, _, words) in places.items() for part in _box(*corner[name], (name, words), NARROW)]
    for start, end in arrows:
        (left, top), (right, bottom) = corner[start], corner[end]
        parts.append(
            f'<path d="M{left + width + 3:g} {top + height / 2:g} L{right - 5:g} {bottom + height / 2:g}" marker-end="url(#end)"/>'
        )
    return _svg(
        "Packages; an arrow runs from what is used to what uses it",
        2 * EDGE + 4 * step + width,
        2 * EDGE + 2 * row + height,
        parts,
    )


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    marker = '<marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    marker += '<path d="M1 1 L7 4 L1 7"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
    return "\n".join(
        [
            head,
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{marker}</defs>",
            *parts,
            "</svg>\n",
        ]
    )


def _arrow(start: float, end: float, y: float) -> str:
    return f'<path d="M{start + 5:g} {y:g} H{end - 6:g}" marker-end="url(#end)"/>'


def _box(left: float, top: float, lines: Lines, size: tuple[int, int] = BOX, *, made: bool = False) -> list[str]:
    middle, kind = left + size[0] / 2, ' class="made"' if made else ""
    words = textwrap.wrap(lines[1], LETTERS) if size == NARROW else [lines[1]]
    small = [
        f'<text class="small" x="{middle:g}" y="{top + 40 + 15 * row:g}">{escape(text)}</text>' for row, text in enumerate(words)
    ]  # fmt: skip
    return [
        f'<rect{kind} x="{left:g}" y="{top:g}" width="{size[0]}" height="{size[1]}" rx="8"/>',
        f'<text x="{middle:g}" y="{top + 22:g}">{escape(lines[0])}</text>',
        *small,
    ]


if __name__ == "__main__":
    main()
