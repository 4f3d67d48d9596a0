"""Whether a running step is still worth finishing, once nobody wants some of its requests any more.

Their blocks come back when the step is over. If it is given up, the requests in it that somebody does want run again
in the next one, so it is given up only if

* at least half of its tokens are nobody's: what is computed again takes no longer than what may be saved;
* none of those that run again push pages out of it. What has been computed twice in different company may differ in
  its last bits, and pages must not change while they are being read;
* if any run again, the step before was not given up at their expense as well. So aborts, however many, cost others
  every second step at most.
"""

from __future__ import annotations

from collections.abc import Collection

from diptych.core.actions import GiveUpStep, RunStep, WorkerAction
from diptych.core.events import StepFinished, StepGivenUp, WorkerEvent


class StepWatch:
    """Decides it for one step after the other. `num_given_up` have been, since the start."""

    def __init__(self) -> None:
        self.num_given_up = 0
        self._asked: RunStep | None = None  # the last step that was to be given up
        self._owing = False  # others have lost a step to aborts, and have had none since

    def observe(self, event: WorkerEvent) -> None:
        """To be told of the end of each step."""
        match event:
            case StepFinished():
                self._owing = False
            case StepGivenUp():
                self.num_given_up += 1

    def decide(self, step: RunStep, unwanted: Collection[str]) -> list[WorkerAction]:
        """Whether to give up the running step, now that nobody wants these of its requests. Says so once."""
        if not unwanted or step is self._asked:
            return []
        others = {row.sequence.request_id: row.num_tokens for row in step.batch.rows}
        for request_id in unwanted:
            others.pop(request_id, None)
        if others:
            pushing = any(push.request_id in others for push in step.pushes)
            if self._owing or pushing or 2 * sum(others.values()) > step.batch.num_tokens:
                return []
            self._owing = True
        self._asked = step
        return [GiveUpStep()]
