"""From what the workers wrote down to the table of `bench.overlap`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from diptych.bench.metrics import Fields
from diptych.bench.report import number, table

BLOCK_SIZE = 16
MARGIN_SECONDS = 2e-3  # what may be exposed beside one layer's share


def summarize(request: Fields, source: Fields, target: Fields) -> Fields:
    """One hand-off on one time axis: seconds from when its prefill began.

    `chunks` are the prefill's steps: when each began and ended, when each layer's KV was there (`layers`) and
    when the target had verified it (`verified`). `exposed` is from when the last layer was `computed` to the
    hand-off's end, `after_kv` the same from that layer's KV on, `transfer` what moving all of it takes alone.
    """
    name = request["request"]
    steps = _steps_of(source, name)
    zero = steps[0]["begin"]
    chunks = [
        {
            "begin": step["begin"] - zero,
            "end": step["end"] - zero,
            "layers": [when - zero for when in step["layers"]],
            "verified": [when - zero for when in _verified(target, name, step["rows"][0][1:], len(step["layers"]))],
        }
        for step in steps
    ]
    computed, complete = steps[-1]["computed"] - zero, target["complete"][name] - zero
    decodes = [[step["begin"] - zero, step["end"] - zero] for step in _steps_of(target, name)]
    num_layers = len(chunks[0]["layers"])
    transfer = _transfer_alone(source, target, f"{name}-cached", request["tokens"])
    return {
        **request,
        "chunks": chunks,
        "decodes": decodes,
        "first_token": chunks[-1]["end"],
        "computed": computed,
        "complete": complete,
        "exposed": complete - computed,
        "after_kv": complete - chunks[-1]["layers"][-1],
        "after_token": complete - chunks[-1]["end"],
        "decode_begins": decodes[0][0] - computed,
        "compute_per_layer": chunks[-1]["end"] / num_layers,
        "transfer": transfer,
        "transfer_per_layer": transfer / num_layers,
    }


def bound(run: Fields) -> float:
    """What `exposed` may be: one layer's share of the transfer, and a margin."""
    return float(run["transfer_per_layer"]) + MARGIN_SECONDS


def of_case(runs: Sequence[Fields], tokens: int, transport: str) -> list[Fields]:
    """The rounds of one length over one transport, least exposed first."""
    chosen = [run for run in runs if (run["tokens"], run["transport"]) == (tokens, transport)]
    return sorted(chosen, key=lambda run: float(run["exposed"]))


def cases(runs: Sequence[Fields]) -> list[tuple[int, str]]:
    """All lengths and transports, in order."""
    return sorted({(run["tokens"], run["transport"]) for run in runs})


def markdown(results: Fields) -> str:
    """The report as one page."""
    machine = results["machine"]
    return f"""# How much of a hand-off is hidden

Made by `{machine["command"]}` on {machine["date"]}, commit {machine["git_commit"]}. {machine["cpu"]},
{machine["cores"]} cores, {machine["memory_gib"]} GiB, {machine["platform"]}, Python {machine["python"]},
torch {machine["torch"]}; load average before the run {machine["load_before"]:.1f}.

![prefill, transfer of each layer and decode on one time axis](overlap.png)

## Torch engine

Eight layers of 2 KiB of KV per token (4 KV heads of 128 in bfloat16), {_rounds(results["torch"])} rounds.

{_table(results["torch"])}

## Scripted engine

Steps that sleep instead of computing, so the processor is free for the transfer, as it is beside a GPU; eight layers of
16 bytes of KV per token: what is left is the cost of the hand-off's messages. {_rounds(results["scripted"])} rounds.

{_table(results["scripted"])}

## What the columns mean

All in milliseconds, medians over rounds in which lengths and transports take their turns, after one round to warm
up. Every worker is the process that serves, with probes (`bench/overlap_worker.py`) around its engine, after its
engine's last layer, and around its receiver's tickets. One request at a time; prompts of random tokens, 512 to a step.

- **compute of a layer**: the prefill, from its first step's begin to the first token, divided by the layers.
- **transfer alone**: the same prompt again, all of whose blocks but the last are still in the prefill worker's cache,
  so that they leave at once: from the first push to the last verified page, the target's leave to write included,
  scaled to all blocks.
- **a layer's share**: of that.
- **bound**: a layer's share + 2 ms. **within**: how many rounds kept to it (each to its own).
- **exposed**: from "the last layer is computed" at the source (attention and MLP; what is left is head and sampling)
  to "every page is verified, and the first token is here" at the target, which then may decode. (The scripted engine's
  last layer is computed when all KV has been read, which stands for attention.)
- **from its KV**: the same, but from "the last layer's KV is written" on, as soon as it can leave: this includes what
  the source still computes of that layer, whether or not anything is moved.
- **after the first token**: the part of it after the source sampled the first token, without which no decode can
  start: what the hand-off itself adds.
- **decode step begins**: from the last layer computed to the first decode step, thread and scheduling delays included.
"""


def _rounds(runs: Sequence[Fields]) -> int:
    return len(of_case(runs, *cases(runs)[0]))


def _table(runs: Sequence[Fields]) -> str:
    header = ["tokens", "transport", "prefill", "compute of a layer", "transfer alone", "a layer's share"]
    header += [
        "bound",
        "exposed (worst)",
        "within",
        "from its KV (worst)",
        "within",
        "after the first token (worst)",
        "within",
        "decode step begins",
    ]
    return table(
        header, [_row(tokens, transport, of_case(runs, tokens, transport)) for tokens, transport in cases(runs)]
    )


def _row(tokens: int, transport: str, runs: Sequence[Fields]) -> list[str]:
    def median(name: str) -> str:
        return number(1000 * statistics.median(run[name] for run in runs), 2)

    def with_worst(name: str) -> str:
        return f"{median(name)} ({number(1000 * max(run[name] for run in runs), 1)})"

    def within(name: str) -> str:
        return f"{sum(run[name] <= bound(run) for run in runs)} of {len(runs)}"

    prefill = number(1000 * statistics.median(run["first_token"] for run in runs), 0)
    allowed = number(1000 * statistics.median(map(bound, runs)), 2)
    return [
        *(f"{tokens:,}", transport, prefill, median("compute_per_layer"), median("transfer")),
        *(median("transfer_per_layer"), allowed, with_worst("exposed"), within("exposed")),
        *(with_worst("after_kv"), within("after_kv")),
        *(with_worst("after_token"), within("after_token"), median("decode_begins")),
    ]


def _steps_of(records: Fields, request_id: str) -> list[Fields]:
    return [step for step in records["steps"] if request_id in {row[0] for row in step["rows"]}]


def _verified(target: Fields, request_id: str, tokens: Sequence[int], num_layers: int) -> list[float]:
    """When the last of these tokens' pages was verified, layer by layer."""
    first, last = (token // BLOCK_SIZE for token in (tokens[0], tokens[1] - 1))
    times = [0.0] * num_layers
    for pages in target["verified"]:
        overlaps = pages["first_block"] <= last and pages["first_block"] + pages["num_blocks"] > first
        if pages["request"] == request_id and overlaps:
            times[pages["layer"]] = max(times[pages["layer"]], pages["time"])
    return times


def _transfer_alone(source: Fields, target: Fields, request_id: str, tokens: int) -> float:
    step = _steps_of(source, request_id)[0]
    cached = step["rows"][0][1]  # where its computation begins
    num_layers = len(step["layers"])
    done = max(_verified(target, request_id, (0, cached), num_layers))
    return float(done - source["pushed"][request_id]) * tokens / cached
