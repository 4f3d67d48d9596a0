"""Clients: each knows what the right answer is, and watches how its stream goes."""

from __future__ import annotations

from diptych.core.errors import DiptychError
from diptych.core.request import TokenOutput
from diptych.engine.scripted import ScriptedModel, expected_tokens
from diptych.sim.scenario import RequestSpec
from diptych.sim.violation import Violation


class Client:
    """One stream, as its client sees it."""

    def __init__(self, spec: RequestSpec, model: ScriptedModel) -> None:
        self.request = spec.request
        sampling = self.request.sampling
        self.right = expected_tokens(self.request.prompt_token_ids, sampling.max_tokens, sampling, model)
        self.tokens: list[int] = []
        self.submitted = self.finished = self.cancelled = False
        self.cut_off = False  # the router has died under it
        self.error: DiptychError | None = None
        self.attempts = 0
        self.workers: dict[str, None] = {}  # that were told to begin with it
        self.engine_faults = 0
        self.deserted_before = 0.0  # of `Router.deserted`, at the last token

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def over(self) -> bool:
        return self.finished or self.cancelled or self.cut_off or self.error is not None

    def describe(self) -> str:
        return f"{len(self.tokens)} of {len(self.right)} tokens came, in {self.attempts} attempts"

    def begin_attempt(self, outputs: tuple[int, ...]) -> None:
        """A worker is told to continue the log."""
        self.attempts += 1
        if list(outputs) != self.tokens:
            raise Violation(
                f"attempt {self.attempts} of {self.request_id} goes on from {len(outputs)} tokens; "
                f"the client has {len(self.tokens)}"
            )

    def take(self, output: TokenOutput) -> None:
        """A token. Raises Violation unless it is the right one at the right time."""
        self._still_open(f"token {output.index}")
        if output.index != len(self.tokens):
            raise Violation(f"{self.request_id} gets token {output.index} after {len(self.tokens)} tokens")
        self.tokens.append(output.token.token_id)
        if self.tokens[-1:] != self.right[output.index : output.index + 1]:
            right = self.right[output.index] if output.index < len(self.right) else "no token"
            raise Violation(f"token {output.index} of {self.request_id} is {self.tokens[-1]}; {right} is right")
        if (output.finish is not None) != (len(self.tokens) == len(self.right)):
            raise Violation(f"{self.request_id} ends ({output.finish}) after {len(self.tokens)} of {len(self.right)}")
        self.finished = output.finish is not None

    def fail(self, error: DiptychError) -> None:
        """The stream ends with an error."""
        self._still_open(f"error {error.code}")
        self.error = error

    def _still_open(self, what: str) -> None:
        if self.over:
            how = "was cancelled" if self.cancelled else "was over"
            raise Violation(f"{self.request_id} gets {what} after it {how}")
