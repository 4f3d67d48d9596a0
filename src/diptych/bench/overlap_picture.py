"""The picture of overlap: prefill, the transfer of each layer, and decode on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.bench.metrics import Fields
from diptych.bench.overlap_report import cases, of_case
from diptych.bench.picture import CALM, DISTURBED, DPI, INK, SHADE

DECODE = "#4c8a57"
SIZE_INCHES = (9.0, 6.4)
LONG_TOKENS = 2048  # the longest prompt whose steps can still be told apart
TAIL_SECONDS = 0.012  # on either side of the last layer's KV, in the enlarged panels


def draw_overlap(runs: Sequence[Fields], path: Path) -> None:
    """Write the picture (PNG or SVG by the ending of `path`): a row for each transport; on the left a whole
    prompt, on the right the end of it, enlarged. Drawn is the round whose exposed time is the median."""
    import matplotlib.pyplot as plt

    tokens = max((length for length, _ in cases(runs) if length <= LONG_TOKENS), default=cases(runs)[0][0])
    transports = [transport for length, transport in cases(runs) if length == tokens]
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(len(transports), 2, squeeze=False, figsize=SIZE_INCHES)
        for row, transport in zip(axes, transports, strict=True):
            ranked = of_case(runs, tokens, transport)
            run = ranked[(len(ranked) - 1) // 2]
            last = run["chunks"][-1]["layers"][-1]
            end = run["decodes"][min(2, len(run["decodes"]) - 1)][1]
            _draw(row[0], run, (0, end), f"{transport}: {tokens:,} tokens")
            _draw(row[1], run, (last - TAIL_SECONDS, last + 2 * TAIL_SECONDS), "the end of it, enlarged")
        names, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(names, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        figure.savefig(path, dpi=DPI, facecolor="white")
        plt.close(figure)


def _draw(panel: Any, run: Fields, span: tuple[float, float], title: str) -> None:
    """Layers from bottom to top; above each layer's computing, its transfer."""
    num_layers = len(run["chunks"][0]["layers"])
    computing: list[list[tuple[float, float]]] = [[] for _ in range(num_layers)]
    moving: list[list[tuple[float, float]]] = [[] for _ in range(num_layers)]
    for chunk in run["chunks"]:
        begin = chunk["begin"]
        for layer, (written, verified) in enumerate(zip(chunk["layers"], chunk["verified"], strict=True)):
            computing[layer].append((1000 * begin, 1000 * (written - begin)))
            moving[layer].append((1000 * written, 1000 * (verified - written)))
            begin = written
    for layer in range(num_layers):
        named = {} if layer else {"computing": "layer computed", "moving": "its pages on their way, until verified"}
        panel.broken_barh(computing[layer], (layer - 0.4, 0.4), color=CALM, label=named.get("computing"))
        panel.broken_barh(moving[layer], (layer, 0.4), color=DISTURBED, label=named.get("moving"))
    decodes = [(1000 * begin, 1000 * (end - begin)) for begin, end in run["decodes"]]
    panel.broken_barh(decodes, (num_layers - 0.3, 0.6), color=DECODE, label="decode step")
    panel.axvspan(1000 * run["computed"], 1000 * run["complete"], color=SHADE, lw=0, zorder=0, label="exposed")
    panel.axvline(1000 * run["first_token"], color=INK, lw=0.8, ls=":", label="first token sampled")
    panel.set_xlim(1000 * span[0], 1000 * span[1])
    panel.set_yticks(range(num_layers + 1), [*map(str, range(num_layers)), "decode"])
    panel.set_ylabel("layer")
    panel.set_xlabel("ms since the prefill began")
    panel.set_title(f"{title} (exposed {1000 * run['exposed']:.1f} ms)", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
