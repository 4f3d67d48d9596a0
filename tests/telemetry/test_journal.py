from __future__ import annotations

import json
from pathlib import Path

from diptych.core.actions import DeliverFailure, PushPages, RunStep
from diptych.core.errors import ServingError
from diptych.core.events import AbortRequested, ServeRequested
from diptych.core.kv_layout import KVLayout
from diptych.core.request import Request
from diptych.core.sequence import Batch, ScheduledSequence, Sequence
from diptych.core.ticket import TicketClaims
from diptych.policy.resharding import plan_transfer
from diptych.telemetry.journal import open_journal

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, dtype="uint8", block_size=4)
CLAIMS = TicketClaims(
    request_id="r",
    worker_id="decode-0",
    epoch=1,
    blocks=(2,),
    first_block=0,
    num_tokens=4,
    layout=LAYOUT,
    model_digest="model",
    salt="",
    nonce=b"nonce",
)
PLAN = plan_transfer(LAYOUT, LAYOUT, [0], [2], first_block=0)


def test_each_event_is_a_line_with_the_actions_it_led_to(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    request = Request(request_id="r", prompt_token_ids=(1, 2))
    row = ScheduledSequence(Sequence.from_log(request), 0, 2, samples=True)
    journal = open_journal(str(path))
    journal.record(1.5, ServeRequested(request), [RunStep(Batch((row,)))])
    journal.record(2.5, AbortRequested("r"), [DeliverFailure("r", ServingError("broken", code="worker_lost"))])
    push = PushPages("r", CLAIMS, PLAN)
    journal.record(3.5, AbortRequested("r"), [push, RunStep(Batch((row,)), (push,))])
    first, second, third = [json.loads(line) for line in path.read_text().splitlines()]
    journal.close()
    assert (first["t"], first["event"]["kind"], first["actions"][0]["kind"]) == (1.5, "ServeRequested", "RunStep")
    assert first["event"]["request"]["prompt_token_ids"] == [1, 2]
    pushed = {"kind": "PushPages", "request_id": "r", "target": "decode-0"}
    assert third["actions"][0] == pushed | {"first_token": 0, "num_tokens": 4, "num_ranges": 2}
    assert third["actions"][1]["pushes"] == third["actions"][:1]
    assert second["actions"][0]["error"] == {"code": "worker_lost", "message": "broken"}


def test_without_a_path_nothing_is_kept() -> None:
    journal = open_journal(None)
    journal.record(0.0, AbortRequested("r"), [])
    journal.close()
