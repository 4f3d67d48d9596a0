"""The picture of interference: every token gap of the running streams, system beside system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.bench.interference import InterferencePlan, Trial
from diptych.bench.metrics import Gap, distribution

CALM, DISTURBED, SHADE, INK = "#2f6f9f", "#c8502b", "#f6e7df", "#333333"
SIZE_INCHES = (9.0, 3.9)
DPI = 150
SMALLEST_MS = 1.0  # shorter gaps, as of tokens that arrive together, are drawn here


def draw_interference(trials: Sequence[Trial], plan: InterferencePlan, path: Path) -> None:
    """Write the picture (PNG or SVG by the ending of `path`): one panel per system, with that of its trials
    whose p99 under disturbance is the median. Opaque, so that it reads on dark pages too."""
    import matplotlib.pyplot as plt

    systems = list(dict.fromkeys(trial.system for trial in trials))
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "svg.fonttype": "none"}):
        figure, axes = plt.subplots(1, len(systems), sharex=True, sharey=True, squeeze=False, figsize=SIZE_INCHES)
        for panel, system in zip(axes[0], systems, strict=True):
            _draw_panel(panel, median_trial([trial for trial in trials if trial.system == system]), plan)
        axes[0][0].set_ylabel("gap between tokens (ms)")
        top = axes[0][0].get_ylim()[1]
        axes[0][0].set_ylim(top=top * 4)  # room for what is written in
        figure.suptitle(_title(plan), fontsize=10)
        figure.tight_layout()
        figure.savefig(path, dpi=DPI, facecolor="white")
        plt.close(figure)


def median_trial(trials: Sequence[Trial]) -> Trial:
    """The one whose p99 under disturbance is the (lower) median."""
    ranked = sorted(trials, key=lambda trial: p99_milliseconds(trial.disturbed_gaps) or 0.0)
    return ranked[(len(ranked) - 1) // 2]


def p99_milliseconds(gaps: Sequence[Gap]) -> float | None:
    p99: float | None = distribution("itl", [gap.seconds for gap in gaps])["p99_itl_ms"]
    return p99


def _title(plan: InterferencePlan) -> str:
    prompts = f"{plan.input_len:,}-token prompts arrive every {plan.interval:g} s (▲)"
    return f"{plan.num_streams} running streams while {prompts}"


def _draw_panel(panel: Any, trial: Trial, plan: InterferencePlan) -> None:
    panel.axvspan(0, trial.disturbed_end, color=SHADE, lw=0, zorder=0)
    for gaps, color in ((trial.calm_gaps, CALM), (trial.disturbed_gaps, DISTURBED)):
        heights = [max(gap.seconds * 1000, SMALLEST_MS) for gap in gaps]
        panel.scatter([gap.end for gap in gaps], heights, s=4, color=color, alpha=0.5, lw=0, rasterized=True)
    arrivals = [number * plan.interval for number in range(plan.num_prompts)]
    panel.plot(arrivals, [0.03] * len(arrivals), "^", ms=3.5, color=INK, transform=panel.get_xaxis_transform())
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_title(trial.system.name, fontsize=10, fontweight="bold")
    panel.set_xlabel("seconds since the first prompt")
    panel.grid(axis="y", color="#dddddd", lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    _write_p99(panel, "calm", trial.calm_gaps, (trial.start / 2, CALM))
    _write_p99(panel, "disturbed", trial.disturbed_gaps, (trial.disturbed_end / 2, DISTURBED))


def _write_p99(panel: Any, phase: str, gaps: Sequence[Gap], where: tuple[float, str]) -> None:
    x, color = where
    p99 = p99_milliseconds(gaps)
    written = "no tokens" if p99 is None else f"p99 {p99:.{0 if p99 >= 10 else 1}f} ms"
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
