"""The simulation's tickets obey the rules of the real ones: the same calls get the same answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import TicketError
from diptych.core.kv_layout import KVLayout
from diptych.core.request import SampledToken
from diptych.core.ticket import TicketClaims
from diptych.sim.tickets import Ending, Tickets
from diptych.transfer import frames, incoming
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


TOKEN = SampledToken(1)


class Both:
    """A real book and a simulated one. Each method makes one call on each, and returns what they answered."""

    def __init__(self) -> None:
        self.real, self.model = TicketBook(EPOCH), Tickets(EPOCH, LAYOUT.num_layers)

    def expect(self, request_id, writer, epoch, page):
        if request_id not in self.model.out:  # policy never grants an id twice at once
            self.real.expect(claims(request_id))
            self.model.expect(claims(request_id))
        return None, None

    def begin(self, request_id, writer, epoch, page):
        try:
            self.real.begin(frames.Begin(request_id, NONCE, epoch), writer, LAYOUT)
            good = True
        except TicketError:
            good = False
        return good, self.model.begin(request_id, NONCE, epoch, writer)

    def pages(self, request_id, writer, epoch, page):
        layer, block = page
        frame = frames.Pages(request_id, NONCE, epoch, layer, 1, 0, block, bytes(DIGEST_BYTES), 0)
        real = self.real.enter(frame, writer)
        model = self.model.find(request_id, NONCE, epoch, writer)
        wanted, ending = real is not None and real.wanted, None
        if real is not None:
            if wanted:
                self.real.mark(real, frame)
            ending = self.real.leave(real)
        if model is None:
            return (wanted, same(ending)), (False, None)
        model.missing.discard(page)
        return (wanted, same(ending)), (True, self.model.frame_done(model))

    def close(self, request_id, writer, epoch, page):
        num_frames = 4 - page[0]
        real, ending = self.real.close(frames.Close(request_id, NONCE, epoch, num_frames, TOKEN, b""), writer)
        model = self.model.find(request_id, NONCE, epoch, writer)
        if real is None or model is None:
            return real, model
        return same(ending), self.model.close(model, num_frames, TOKEN)

    def fail(self, request_id, writer, epoch, page):
        """Of a page that is wrong; its frame is done with, all the same."""
        layer, block = page
        frame = frames.Pages(request_id, NONCE, epoch, layer, 1, 0, block, bytes(DIGEST_BYTES), 0)
        real = self.real.enter(frame, writer)
        model = self.model.find(request_id, NONCE, epoch, writer)
        if real is None or model is None:
            return real is not None and self.real.leave(real) is None and real.wanted, model is not None
        answers = self.real.fail(real), self.model.fail(model)
        self.real.leave(real)
        self.model.frame_done(model)
        return answers

    def revoke(self, request_id, writer, epoch, page):
        real, model = self.real.revoke(request_id), self.model.revoke(request_id)
        return (real[0] is None, real[1]), (model[0] is None, model[1])

    def stopped(self, request_id, writer, epoch, page):
        real, _ = self.real.stop(frames.Stopped(request_id, NONCE), writer)
        model = self.model.stopped(request_id, NONCE, writer)
        return real and (real.released, real.failed), model and (model.released, model.failed)

    def writer_lost(self, request_id, writer, epoch, page):
        real, model = self.real.writer_lost(writer), self.model.writer_lost(writer)
        return [(t.claims.request_id, t.released) for t in real], [(t.claims.request_id, t.released) for t in model]


def same(ending: incoming.Ending | None) -> Ending | None:
    """In the simulation's terms."""
    return None if ending is None else Ending[ending.name]


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
        what, *details = call
        real, model = getattr(both, what)(*details)
        assert real == model, call
