"""Runs cases, several at a time, and says what came of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import aiohttp

from diptych.bench.faults.fleet import Answer, Violation, longest_wait


class Case(Protocol):
    """`run` gets a directory of its own, which does not exist yet; its log stays there."""

    @property
    def name(self) -> str: ...

    async def run(self, directory: Path) -> Outcome: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """`violation` is empty if all is well; `what` happened in a few words."""

    name: str
    violation: str
    what: str
    seconds: float
    longest_wait: float  # of a client, in seconds

    def fields(self) -> dict[str, Any]:
        return {
            "case": self.name,
            "violation": self.violation,
            "what": self.what,
            "longest_wait": round(self.longest_wait, 2),
            "seconds": round(self.seconds, 1),
        }


class Story(Protocol):
    """A case under way, and in the end what is to be told of it."""

    answers: list[Answer]

    def summary(self) -> str: ...


async def outcome(name: str, run: Callable[[], Awaitable[None]], story: Story) -> Outcome:
    """Run one case, which raises Violation if something is not as it must be."""
    began = time.monotonic()
    violation = ""
    try:
        await run()
    except Violation as error:
        violation = str(error)
    except (aiohttp.ClientError, TimeoutError) as error:
        violation = f"the server does not answer: {error!r}"
    return Outcome(name, violation, story.summary(), time.monotonic() - began, longest_wait(story.answers))


async def run_all(cases: Sequence[Case], parallel: int, directory: Path) -> list[Outcome]:
    """All cases, so many at a time, in the order of `cases`; each is printed as it ends."""
    places = asyncio.Semaphore(parallel)

    async def run_one(number: int, case: Case) -> Outcome:
        async with places:
            result = await case.run(directory / str(number))
        verdict = f"VIOLATED: {result.violation} ({directory / str(number)}/log)" if result.violation else "ok"
        print(f"{result.name:<60} {result.seconds:5.1f} s  {verdict}; {result.what}", flush=True)
        return result

    return await asyncio.gather(*(run_one(number, case) for number, case in enumerate(cases)))
