"""A worker that nobody supervises freezes, is given up, and comes back."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest
from joined import join_point, joining, leave, ready
from server import SCRIPTED, is_idle, serving, soon

from diptych.engine.scripted import expected_tokens


@pytest.mark.fault(36, 46)
def test_a_frozen_worker_is_given_up_and_comes_back_in_a_new_life(tmp_path: Path) -> None:
    """Its streams go on elsewhere. What it still says when it thaws belongs to a life that is over."""
    key = str(tmp_path / "key")
    fleet = ("--mixed", "1", "--listen", "127.0.0.1:0", "--key-file", key)
    with serving(*SCRIPTED, *fleet) as server, contextlib.ExitStack() as stack:
        flags = ("--role", "mixed", "--id", "far", "--join", join_point(server), "--key-file", key)
        process = stack.enter_context(joining(tmp_path / "log", *SCRIPTED, *flags))
        epoch = ready(server, "far")
        prompts = ([64 + number] * 40 for number in range(32))
        streams = ((prompt, stack.enter_context(server.stream(prompt, "local", max_tokens=500))) for prompt in prompts)
        prompt, stream = next((prompt, stream) for prompt, stream in streams if stream.route == "local=far")
        token_ids = [next(stream.token_ids)]
        process.send_signal(signal.SIGSTOP)
        token_ids += stream.token_ids
        assert (stream.done, token_ids) == (True, expected_tokens(prompt, 500))
        soon(lambda: "far" not in server.fleet(), "it is given up")
        process.send_signal(signal.SIGCONT)
        ready(server, "far", above=epoch)
        soon(lambda: is_idle(server), "all blocks are given back")
        leave(process)
