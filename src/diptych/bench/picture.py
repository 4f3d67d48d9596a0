"""The picture of interference: every token gap of the running streams, system beside system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.bench.interference import InterferencePlan, Trial
from diptych.bench.metrics import Gap, distribution
from diptych.bench.server import System

CALM, DISTURBED, SHADE, INK = "#2f6f9f", "#c8502b", "#f6e7df", "#333333"
SIZE_INCHES = (9.0, 3.9)
DPI = 150
SMALLEST_MS = 1.0  # shorter gaps, as of tokens that arrive together, are drawn here


def draw_interference(trials: Sequence[Trial], plan: InterferencePlan, path: Path) -> None:
    """Write the picture (PNG or SVG by the ending of `path`): one panel per system, all trials laid over
    each other so that the first prompt arrives at zero. Opaque, so that it reads on dark pages too."""
    import matplotlib.pyplot as plt

    systems = list(dict.fromkeys(trial.system for trial in trials))
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(1, len(systems), sharex=True, sharey=True, squeeze=False, figsize=SIZE_INCHES)
        for panel, system in zip(axes[0], systems, strict=True):
            _draw_panel(panel, system, [trial for trial in trials if trial.system == system], plan)
        axes[0][0].set_ylabel("gap between tokens (ms)")
        top = axes[0][0].get_ylim()[1]
        axes[0][0].set_ylim(top=top * 4)  # room for what is written in
        figure.suptitle(_title(plan), fontsize=10)
        figure.tight_layout()
        figure.savefig(path, dpi=DPI, facecolor="white")
        plt.close(figure)


def _title(plan: InterferencePlan) -> str:
    prompts = f"{plan.input_len:,}-token prompts arrive every {plan.interval:g} s (▲)"
    return f"{plan.num_streams} running streams while {prompts}"


def _draw_panel(panel: Any, system: System, trials: Sequence[Trial], plan: InterferencePlan) -> None:
    disturbed_end = max(trial.disturbed_end for trial in trials)
    calm = [gap for trial in trials for gap in trial.calm_gaps]
    disturbed = [gap for trial in trials for gap in trial.disturbed_gaps]
    panel.axvspan(0, disturbed_end, color=SHADE, lw=0, zorder=0)
    for gaps, color in ((calm, CALM), (disturbed, DISTURBED)):
        heights = [max(gap.seconds * 1000, SMALLEST_MS) for gap in gaps]
        panel.scatter([gap.end for gap in gaps], heights, s=3, color=color, alpha=0.4, lw=0, rasterized=True)
    arrivals = [number * plan.interval for number in range(plan.num_prompts)]
    panel.plot(arrivals, [0.03] * len(arrivals), "^", ms=3.5, color=INK, transform=panel.get_xaxis_transform())
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_title(system.name, fontsize=10, fontweight="bold")
    panel.set_xlabel("seconds since the first prompt")
    panel.grid(axis="y", color="#dddddd", lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    start = min(trial.start for trial in trials)
    _write_p99(panel, "calm", calm, (start / 2, CALM))
    _write_p99(panel, "disturbed", disturbed, (disturbed_end / 2, DISTURBED))


def _write_p99(panel: Any, phase: str, gaps: Sequence[Gap], where: tuple[float, str]) -> None:
    p99 = distribution("itl", [gap.seconds for gap in gaps])["p99_itl_ms"]
    written = "no tokens" if p99 is None else f"p99 {p99:,.1f} ms" if p99 < 100 else f"p99 {p99:,.0f} ms"
    x, color = where
    panel.text(
        x,
        0.97,
        f"{phase}\n{written}",
        transform=panel.get_xaxis_transform(),
        ha="center",
        va="top",
        color=color,
        fontweight="bold",
    )
