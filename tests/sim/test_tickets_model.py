"""The simulation's tickets obey the rules of the real ones: the same calls get the same answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import TicketError, TransferError
from diptych.core.kv_layout import KVLayout
from diptych.core.ticket import TicketClaims
from diptych.sim.tickets import Tickets
from diptych.transfer import frames
from diptych.transfer.digest import DIGEST_BYTES
from diptych.transfer.incoming import TicketBook

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype="uint8", block_size=4)
EPOCH = 7
NONCE = b"n" * 16


def claims(request_id: str) -> TicketClaims:
    return TicketClaims(
        request_id=request_id,
        worker_id="d",
        epoch=EPOCH,
        blocks=(5, 3, 8),
        first_block=1,
        num_tokens=12,
        layout=LAYOUT,
        model_digest="m",
        salt="",
        nonce=NONCE,
    )


class Both:
    """A real book and a simulated one."""

    def __init__(self) -> None:
        self.real, self.model = TicketBook(EPOCH, LAYOUT.num_layers), Tickets(EPOCH, LAYOUT.num_layers)

    def call(self, what: str, request_id: str, writer: str, epoch: int, page: tuple[int, int]) -> tuple[object, object]:
        """One call on each; what they answered, in comparable form."""
        return getattr(self, what)(request_id, writer, epoch, page)

    def expect(self, request_id, writer, epoch, page):
        if request_id not in self.model.out:  # policy never grants an id twice at once
            self.real.expect(claims(request_id))
            self.model.expect(claims(request_id))
        return None, None

    def begin(self, request_id, writer, epoch, page):
        try:
            self.real.begin(request_id, NONCE, epoch, writer)
            good = True
        except TicketError:
            good = False
        return good, self.model.begin(request_id, NONCE, epoch, writer)

    def pages(self, request_id, writer, epoch, page):
        real = self.real.find(request_id, NONCE, epoch, writer)
        model = self.model.find(request_id, NONCE, epoch, writer)
        if real is not None and model is not None:
            layer, block = page
            self.real.mark(real, frames.Pages(request_id, NONCE, epoch, layer, block, bytes(DIGEST_BYTES), 0))
            model.missing.discard(page)
        return real is not None, model is not None

    def close(self, request_id, writer, epoch, page):
        real = self.real.find(request_id, NONCE, epoch, writer)
        model = self.model.find(request_id, NONCE, epoch, writer)
        if real is None or model is None:
            return real, model
        try:
            complete = self.real.close(real)
        except TransferError:
            complete = False
        return complete, self.model.close(model)

    def fail(self, request_id, writer, epoch, page):
        real = self.real.find(request_id, NONCE, epoch, writer)
        model = self.model.find(request_id, NONCE, epoch, writer)
        if real is None or model is None:
            return real, model
        return self.real.fail(real), self.model.fail(model)

    def revoke(self, request_id, writer, epoch, page):
        real, model = self.real.revoke(request_id), self.model.revoke(request_id)
        return (real[0] is None, real[1]), (model[0] is None, model[1])

    def stopped(self, request_id, writer, epoch, page):
        real = self.real.stopped(request_id, NONCE, writer)
        model = self.model.stopped(request_id, NONCE, writer)
        return real and (real.released, real.failed), model and (model.released, model.failed)

    def writer_lost(self, request_id, writer, epoch, page):
        real, model = self.real.writer_lost(writer), self.model.writer_lost(writer)
        return [(t.claims.request_id, t.released) for t in real], [(t.claims.request_id, t.released) for t in model]


CALLS = st.tuples(
    st.sampled_from(
        ("expect", "begin", "pages", "pages", "pages", "close", "fail", "revoke", "stopped", "writer_lost")
    ),
    st.sampled_from(("r1", "r2")),
    st.sampled_from(("w1", "w2")),
    st.sampled_from((EPOCH, EPOCH, EPOCH, 6)),
    st.tuples(st.integers(0, 1), st.integers(1, 2)),
)


@given(st.lists(CALLS, max_size=40))
def test_real_tickets_and_simulated_ones_answer_alike(calls: list[tuple[str, str, str, int, tuple[int, int]]]) -> None:
    both = Both()
    for call in calls:
        real, model = both.call(*call)
        assert real == model, call
