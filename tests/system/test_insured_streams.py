"""A stream whose KV is copied while it runs, and whose workers are killed."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

from server import SCRIPTED, is_idle, serving, soon

from diptych.engine.scripted import expected_tokens

PROMPT = [number % 250 + 1 for number in range(1500)]
LENGTH = 400
EVERY = 32
BLOCK = 16


def first_tokens_of_later_attempts(journal: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (journal / "router.jsonl").read_text().splitlines()]
    events = [line["event"] for line in lines if line["event"]["kind"] == "FirstTokenMade"]
    return [event for event in events if re.fullmatch(r"cmpl-[^~]*~[0-9]+", event["output"]["request_id"])]


def test_a_stream_goes_on_from_its_last_copy_when_both_of_its_workers_are_killed(tmp_path: Path) -> None:
    flags = ("--prefill", "2", "--decode", "2", "--checkpoint-tokens", str(EVERY), "--journal", str(tmp_path))
    with serving(*SCRIPTED, *flags) as server, server.stream(PROMPT, max_tokens=LENGTH) as stream:
        route = dict(part.split("=") for part in stream.route.split(";"))
        token_ids = [next(stream.token_ids) for _ in range(20)]
        soon(lambda: server.metric("diptych_router_checkpoints_total") >= 1, "the prompt's KV is copied")
        workers = server.fleet()
        for role in ("prefill", "decode"):
            os.kill(workers[route[role]]["pid"], signal.SIGKILL)
        token_ids += stream.token_ids
        assert token_ids == expected_tokens(PROMPT, LENGTH)
        assert stream.error is None
        soon(lambda: is_idle(server), "all blocks are given back")
        *_, again = first_tokens_of_later_attempts(tmp_path)
        assert again["worker_id"] not in route.values()
        assert again["num_cached_tokens"] >= len(PROMPT) // BLOCK * BLOCK
