"""The ports: narrow protocols between policy-driven shells and what they drive.

`Engine` is per step (its fake is `engine.scripted`), `PageSource` is where KV bytes are read, `Dispatcher` is
what the front needs of the router. How bytes are moved is `transfer.writers.PageWriter`, with `transfer.faulty`
to spoil them. (`Backend`, per worker, arrives with the adapters for upstream engines.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Protocol

from diptych.core.errors import EngineLost
from diptych.core.fleet import ModelInfo, Readiness, Route, RouterStats, WorkerView
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.request import Request, SampledToken, TokenOutput
from diptych.core.sequence import Batch
from diptych.core.timeline import Timeline

OnLayer = Callable[[int], None]
OnLost = Callable[[EngineLost], None]


class Unwanted(Protocol):
    """Requests of a running step that nobody wants any more. Another thread adds to them while it runs."""

    def take(self) -> frozenset[str]:
        """Those that have come since the last call."""
        ...

    def let_go(self, request_ids: Iterable[str]) -> None:
        """From now on the step neither reads nor writes their blocks."""
        ...

    def wait(self, seconds: float) -> None:
        """For that long, or until there is something to take."""
        ...


class KVBytes(Protocol):
    """Memory for one rank's KV cache: zeroed, page-aligned."""

    @property
    def buffer(self) -> memoryview: ...

    @property
    def descriptor(self) -> int | None:
        """By which other processes can map it; None if they cannot."""
        ...


AllocateKV = Callable[[int], KVBytes]


class Engine(Protocol):
    """Computes steps of a model over a paged KV cache. Not thread-safe: one step at a time."""

    @property
    def model(self) -> ModelInfo: ...

    @property
    def layout(self) -> KVLayout: ...

    def allocate_kv(self, num_blocks: int, allocate: AllocateKV) -> tuple[KVMemory, ...]:
        """Take `num_blocks` blocks of KV cache for each rank of the layout, out of one `allocate(nbytes)`
        for each, in order of ranks. Called once, before the first step."""
        ...

    def step(
        self, batch: Batch, on_layer: OnLayer | None = None, unwanted: Unwanted | None = None
    ) -> list[SampledToken | None]:
        """Compute KV for every row and sample where a row says so.

        Returns one entry per row, None where the row does not sample. `on_layer(i)` is called, on the
        calling thread, as soon as all ranks have written the KV of layer i for all rows (0 to L-1, in order).
        Rows that become `unwanted` meanwhile may be left out from some layer on; then they are let go, and their
        entries are None.
        """
        ...

    def forget(self, request_id: str) -> None:
        """Drop whatever is remembered for a request beyond its log (penalty counts). Harmless if unknown."""
        ...

    def watch(self, lost: OnLost) -> None:
        """Have `lost` called, on any thread, if the engine breaks down between steps; at once if it has already. A
        later call replaces an earlier one."""
        ...

    def close(self) -> None: ...


class PageSource(Protocol):
    """Where pages are read from: a `KVMemory`, or somebody else's KV cache seen like one."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def layer(self, index: int) -> memoryview:
        """The bytes of one layer: num_blocks * block_bytes of them."""
        ...


class TokenStream(Protocol):
    """One accepted request, as the front sees it: an async iterator over its tokens.

    Iteration ends after the token that carries `finish`; it raises a DiptychError if the request can
    not go on. `route`, `num_cached_tokens` and the first phases of `timeline` are set when the first
    token arrives; all of `timeline` when the last one has.
    """

    @property
    def route(self) -> Route | None:
        """None as long as it waits for its turn."""
        ...

    @property
    def num_cached_tokens(self) -> int: ...

    @property
    def timeline(self) -> Timeline: ...

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    def cancel(self) -> None:
        """The client is gone, or has enough: stop in all pools. Idempotent; harmless after the end."""
        ...


class Dispatcher(Protocol):
    """What the front needs of the router."""

    @property
    def model(self) -> ModelInfo: ...

    def check(self, tenant: str) -> None:
        """Raises what `submit` would raise for any request of this tenant, however small: so that nothing need
        be read, parsed or tokenized in vain."""
        ...

    def submit(self, request: Request) -> TokenStream:
        """Accept a request. Raises OverloadedError or UnavailableError (with `retry_after`)."""
        ...

    def workers(self) -> list[WorkerView]: ...

    def stats(self) -> RouterStats: ...

    def alive(self) -> bool:
        """The router's own loop beats."""
        ...

    def readiness(self) -> Readiness:
        """Whether requests that are sent now are served, and as they are meant to be."""
        ...
