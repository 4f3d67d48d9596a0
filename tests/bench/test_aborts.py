"""What the journals say of a request's end; and one client that really hangs up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diptych.bench.aborts import CASES, Freed, Journals, fields, measure


def write(path: Path, *lines: tuple[float, dict[str, Any], list[dict[str, Any]]]) -> None:
    path.write_text(
        "".join(json.dumps({"t": t, "event": event, "actions": actions}) + "\n" for t, event, actions in lines)
    )


def event(kind: str, request_id: str = "r.0") -> dict[str, Any]:
    return {"kind": kind, "request_id": request_id}


def test_the_last_line_that_lets_go_of_blocks_counts(tmp_path: Path) -> None:
    aborts = [event("AbortOn"), event("AbortOn")]
    write(
        tmp_path / "router.jsonl",
        (9.0, event("RequestCancelled", "early"), []),
        (10.01, event("RequestCancelled", "r"), aborts),
    )
    write(
        tmp_path / "prefill-0.jsonl",
        (10.02, event("AbortRequested"), [event("DropRow")]),
        (10.03, event("RowsDropped"), [event("AbandonPush"), event("ForgetRequest")]),
        (10.04, event("PushStopped"), []),
        (10.05, event("PushStopped", "other"), []),
    )
    write(
        tmp_path / "decode-0.jsonl",
        (10.02, event("AbortRequested"), [event("RevokeTicket"), event("ForgetRequest")]),
        (10.06, event("WriterGone"), []),
    )
    journals = Journals(tmp_path)
    freed = journals.freed(10.0)
    assert freed is not None
    assert {role: round(1e3 * seconds) for role, seconds in freed.blocks.items()} == {"prefill": 40, "decode": 60}
    assert {role: round(1e3 * seconds) for role, seconds in freed.heard.items()} == {"prefill": 20, "decode": 20}
    assert journals.freed(10.5) is None


def test_figures_are_those_of_requests_that_were_accepted() -> None:
    freed = Freed(0.001, heard={"decode": 0.002}, blocks={"decode": 0.004})
    row = fields([freed, None], 2)
    assert (row["disconnects"], row["accepted"], row["prefill_requests"], row["decode_requests"]) == (2, 1, 0, 1)
    assert (row["median_all_free_ms"], row["max_prefill_free_ms"]) == (4.0, None)


def test_all_blocks_of_a_client_that_hangs_up_become_free() -> None:
    [row] = measure("scripted", 1, CASES[1:2])
    assert (row["case"], row["accepted"], row["decode_requests"]) == ("while it decodes", 1, 1)
    assert row["max_all_free_ms"] > 0
