"""What can be wrong with a hand-off: each kind is one function that makes it go wrong once, and sees how it ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from fault_rig import Request, Rig, Unharmed
from raw_source import RawSource, Sendable
from transfer_harness import EPOCH, KEY, NUM_BLOCKS, TOKEN

from diptych.core.errors import HandshakeError, TicketError
from diptych.core.events import PushAccepted, PushRejected, PushStopped, WriterGone
from diptych.policy.resharding import plan_resharding
from diptych.transfer import frames
from diptych.transfer.faulty import Fault
from diptych.wire.tickets import mint, open_ticket

TRANSPORTS = ("local", "shm", "tcp")


# faults of the bytes, in the real sender


def spoiled_by_writer(fault: Fault) -> Callable[[Rig], None]:
    def inject(rig: Rig) -> None:
        request = rig.request()
        made, claims = rig.made, request.claims
        plan = plan_resharding(request.source, request.target, request.tokens)
        num_pieces = len(rig.raw.frames_of(claims, plan))
        rig.link.begin(claims.request_id, claims)
        wait_for_link(rig)
        switch = rig.switches[-1]
        switch.arm({rig.dice.randrange(num_pieces): fault}, rig.dice.getrandbits(32))
        for layer in range(claims.layout.num_layers):
            rig.link.push(claims.request_id, claims, plan, [layer])
        rig.link.close_handoff(claims.request_id, claims, TOKEN)
        outcome = made.at_source.next()
        switch.faulty = None
        if outcome == PushAccepted(claims.request_id):
            rig.is_served(request)
            raise Unharmed
        assert rig.fails(request) in ("kv_corrupt", "transfer_failed")
        assert isinstance(outcome, PushRejected)

        def stop() -> None:
            rig.link.abandon(claims.request_id, claims)
            events = [made.at_source.next()]
            if not isinstance(events[0], PushStopped):  # it heard of the revocation first
                events.append(made.at_source.next())
            assert events[-1] == PushStopped(claims.request_id)

        rig.comes_back(request, stop)

    return inject


def wait_for_link(rig: Rig) -> None:
    """Until the link has its writer."""
    deadline = time.monotonic() + 20
    while not rig.switches:
        assert time.monotonic() < deadline
        time.sleep(0.001)


# faults of what is said, by a source that says anything


def begun(rig: Rig) -> tuple[Request, list[Sendable]]:
    request = rig.request()
    assert isinstance(rig.raw.begin(request.claims), frames.Go)
    return request, rig.sendables(request)


def rejected(rig: Rig, request: Request, code: str | None = None) -> None:
    """The target has seen through it; everything that follows is late."""
    answer = rig.raw.hears(frames.Rejected)
    assert rig.fails(request) == answer.code == (code or answer.code)
    rig.raw.close_handoff(request.claims)

    def stop() -> None:
        rig.raw.hears(frames.Cancel)
        rig.raw.stopped(request.claims)

    rig.comes_back(request, stop)


def misdirected_pages(rig: Rig) -> None:
    """Bytes of another request's blocks, with the digests of this one's."""
    request, sendables = begun(rig)
    other = replace(request.source, blocks=rig.dice.sample(range(NUM_BLOCKS), len(request.source.blocks)))
    strangers = {item.key: item for item in rig.sendables(request, other)}
    for index, sendable in enumerate(sendables):
        right, wrong = sendable.content, strangers[sendable.key].content
        if index == 0 and right == wrong:
            for item in sendables:
                rig.raw.send(item)
            rig.raw.close_handoff(request.claims)
            rig.raw.hears(frames.Accepted)
            rig.is_served(request)
            raise Unharmed
        rig.raw.send(sendable, wrong if index == 0 else right)
    rejected(rig, request, "kv_corrupt")


def foreign_frame(rig: Rig) -> None:
    """Pages for a ticket that somebody else writes for."""
    victim = rig.request()
    with RawSource(rig.made) as other:
        assert isinstance(other.begin(victim.claims), frames.Go)
        sendables = rig.sendables(victim)
        rig.raw.announce(sendables[0], sendables[0].content[::-1])
        rig.raw.close_handoff(victim.claims)
        rig.served_as_ever(rig.raw)  # so these have been seen
        for sendable in sendables:
            other.send(sendable)
        other.close_handoff(victim.claims)
        other.hears(frames.Accepted)
        rig.is_served(victim)


def duplicates(rig: Rig) -> None:
    request, sendables = begun(rig)
    again = rig.dice.sample(sendables, rig.dice.randint(1, len(sendables)))
    everything = sendables + again
    rig.dice.shuffle(everything)
    for sendable in everything:
        rig.raw.send(sendable)
    rig.raw.close_handoff(request.claims)
    rig.raw.hears(frames.Accepted)
    rig.is_served(request)


def spoiled_duplicate(rig: Rig) -> None:
    """A page that is verified already comes again, and is another one."""
    request, sendables = begun(rig)
    for sendable in sendables:
        rig.raw.send(sendable)
    victim = rig.dice.choice(sendables)
    rig.raw.send(victim, flipped(victim.content, rig.dice))
    rig.raw.close_handoff(request.claims)
    rejected(rig, request, "kv_corrupt")


def flipped(content: bytes, dice: random.Random) -> bytes:
    wrong = bytearray(content)
    wrong[dice.randrange(len(wrong))] ^= 1 << dice.randrange(8)
    return bytes(wrong)


def wrong_digest(rig: Rig) -> None:
    request, sendables = begun(rig)
    victim = rig.dice.choice(sendables)
    for sendable in sendables:
        spoiled = flipped(sendable.frame.digests, rig.dice) if sendable is victim else sendable.frame.digests
        rig.raw.send(replace(sendable, frame=with_fields(sendable.frame, digests=spoiled)))
    rejected(rig, request, "kv_corrupt")


def with_fields(frame: frames.Pages, **changes: object) -> frames.Pages:
    fields = {name: getattr(frame, name) for name in frame.__struct_fields__}
    return frames.Pages(**(fields | changes))


def out_of_place(rig: Rig) -> None:
    """A layer, pair or group that nobody asked for."""
    request, sendables = begun(rig)
    victim = rig.dice.choice(sendables)
    field = rig.dice.choice(("layer", "num_layers", "pair", "first_group"))
    wrong = rig.dice.choice((-1, -(2**62), 2**31, 2**62, 1000))
    rig.raw.announce(replace(victim, frame=with_fields(victim.frame, **{field: wrong})), victim.content)
    rejected(rig, request, "transfer_failed")


def wrong_size(rig: Rig) -> None:
    """Digests for more or fewer units than bytes follow."""
    request, sendables = begun(rig)
    victim = rig.dice.choice(sendables)
    cut = rig.dice.choice((victim.frame.digests[:-1], victim.frame.digests[:-8], victim.frame.digests * 2))
    rig.raw.announce(replace(victim, frame=with_fields(victim.frame, digests=cut)), victim.content)
    rig.raw.close_handoff(request.claims)  # to mapped memory, digests of fewer units are no lie as such
    rejected(rig, request)


def early_close(rig: Rig) -> None:
    request, sendables = begun(rig)
    for sendable in sendables[: rig.dice.randrange(len(sendables))]:
        rig.raw.send(sendable)
    rig.raw.close_handoff(request.claims)
    rejected(rig, request, "transfer_failed")


def stale_epoch_begin(rig: Rig) -> None:
    request = rig.request()
    stale = replace(request.claims, epoch=EPOCH - rig.dice.randint(1, 5))
    assert isinstance(rig.raw.begin(stale), frames.Rejected)
    rig.comes_back(request, lambda: None)


def stale_epoch_pages(rig: Rig) -> None:
    """Of an earlier life, among those of this one."""
    request, sendables = begun(rig)
    victim = rig.dice.choice(sendables)
    stale = replace(victim, frame=with_fields(victim.frame, epoch=EPOCH - 1))
    rig.raw.announce(stale, flipped(victim.content, rig.dice))
    for sendable in sendables:
        rig.raw.send(sendable)
    rig.raw.close_handoff(request.claims)
    rig.raw.hears(frames.Accepted)
    rig.is_served(request)


def replayed_ticket(rig: Rig) -> None:
    """A ticket that has served its purpose."""
    request, sendables = begun(rig)
    for sendable in sendables:
        rig.raw.send(sendable)
    rig.raw.close_handoff(request.claims)
    rig.raw.hears(frames.Accepted)
    before = [bytes(memory.buffer) for memory in rig.made.targets]
    assert isinstance(rig.raw.begin(request.claims), frames.Rejected)
    rig.raw.announce(sendables[0], flipped(sendables[0].content, rig.dice))
    rig.raw.close_handoff(request.claims)
    assert isinstance(rig.raw.begin(request.claims), frames.Rejected)
    assert before == [bytes(memory.buffer) for memory in rig.made.targets]
    rig.is_served(request)


def stolen_ticket(rig: Rig) -> None:
    """A ticket that is in use."""
    request, sendables = begun(rig)
    with RawSource(rig.made) as thief:
        assert isinstance(thief.begin(request.claims), frames.Rejected)
    for sendable in sendables:
        rig.raw.send(sendable)
    rig.raw.close_handoff(request.claims)
    rig.raw.hears(frames.Accepted)
    rig.is_served(request)


def forged_ticket(rig: Rig) -> None:
    """Nobody granted it: another nonce, and no fleet key."""
    request = rig.request()
    forged = replace(request.claims, nonce=rig.dice.randbytes(16))
    assert isinstance(rig.raw.begin(forged), frames.Rejected)
    genuine = mint(request.claims, KEY)
    for bad in (mint(request.claims, b"x" * 32), flipped(genuine, rig.dice)):
        try:
            open_ticket(bad, KEY)
        except TicketError:
            continue
        raise AssertionError("a forged ticket was opened")
    rig.comes_back(request, lambda: None)


def write_after_free(rig: Rig) -> None:
    """The target takes its blocks back while the source writes: they stay out of use until that has stopped, and what
    is sent later changes nothing in the hands of whoever has the blocks next."""
    request, sendables = begun(rig)
    cut = rig.dice.randrange(len(sendables))
    for sendable in sendables[:cut]:
        rig.raw.send(sendable)
    rig.made.receiver.revoke(request.claims.request_id)
    rig.raw.hears(frames.Cancel)
    for sendable in sendables[cut:]:
        rig.raw.send(sendable)
    assert isinstance(rig.raw.begin(replace(request.claims, nonce=b"?" * 16)), frames.Rejected)  # all of it was seen
    assert rig.made.at_target.empty
    assert rig.pool.num_used == len(request.blocks)
    rig.raw.stopped(request.claims)
    assert rig.made.at_target.next() == WriterGone(request.claims.request_id)
    rig.pool.release(request.blocks[::-1])
    successor, theirs = begun(rig)
    for sendable in theirs:
        rig.raw.send(sendable)
        late = rig.dice.choice(sendables)
        rig.raw.announce(late, late.content)
    rig.raw.close_handoff(successor.claims)
    rig.raw.hears(frames.Accepted)
    rig.is_served(successor)


# faults of connections


def lost_connection(rig: Rig) -> None:
    """The source is gone in the middle, perhaps of a frame."""
    request = rig.request()
    with RawSource(rig.made) as source:
        assert isinstance(source.begin(request.claims), frames.Go)
        sendables = rig.sendables(request)
        for sendable in sendables[: rig.dice.randrange(len(sendables))]:
            source.send(sendable)
        if rig.dice.random() < 0.5:
            source.send_torn(sendables[-1], rig.dice.random())
    assert rig.fails(request) == "transfer_failed"
    rig.comes_back(request, lambda: None)


def garbage(rig: Rig) -> None:
    request = rig.request()
    with RawSource(rig.made) as source:
        assert isinstance(source.begin(request.claims), frames.Go)
        source.send_raw(b"\x00\x00\x00\x09\xc1" + rig.dice.randbytes(8))
    assert rig.fails(request) == "transfer_failed"
    rig.comes_back(request, lambda: None)


def hostile_hello(rig: Rig) -> None:
    """A layout that is not the model's, or beyond all reason."""
    layout = rig.made.source.layout
    hostile = rig.dice.choice(
        (
            replace(layout, block_size=2**40),
            replace(layout, tensor_parallel=2**40),
            replace(layout, data_parallel=2**40),
            replace(layout, num_layers=2**40),
            replace(layout, num_kv_heads=2**40, tensor_parallel=1),
            replace(layout, head_dim=7),
        )
    )
    with RawSource(rig.made, layout=hostile) as source:
        assert isinstance(source.welcome, frames.Refused)
    rig.served_as_ever(rig.raw)


def wrong_key(rig: Rig) -> None:
    try:
        RawSource(rig.made, key=rig.dice.randbytes(32))
    except HandshakeError:
        rig.served_as_ever(rig.raw)
    else:
        raise AssertionError("a stranger was let in")


@dataclass(frozen=True, slots=True)
class Kind:
    """`counted` is the counter of the book that has to go up; `transports` where there is such a thing."""

    inject: Callable[[Rig], None]
    counted: str
    transports: tuple[str, ...] = TRANSPORTS


KINDS = {
    **{f"bytes: {fault}": Kind(spoiled_by_writer(fault), "failed hand-off") for fault in Fault},
    "bytes: misdirected": Kind(misdirected_pages, "corrupt pages"),
    "bytes: wrong digest": Kind(wrong_digest, "corrupt pages"),
    "duplicate frames": Kind(duplicates, "duplicate pages"),
    "duplicate frame, other bytes": Kind(spoiled_duplicate, "corrupt pages"),
    "frame of another request": Kind(foreign_frame, "stray frame"),
    "frame out of place": Kind(out_of_place, "failed hand-off"),
    "frame of wrong size": Kind(wrong_size, "failed hand-off"),
    "closed too early": Kind(early_close, "failed hand-off"),
    "stale epoch: ticket": Kind(stale_epoch_begin, "unknown ticket"),
    "stale epoch: pages": Kind(stale_epoch_pages, "stray frame"),
    "ticket replayed": Kind(replayed_ticket, "unknown ticket"),
    "ticket stolen": Kind(stolen_ticket, "used ticket"),
    "ticket forged": Kind(forged_ticket, "unknown ticket"),
    "write after free": Kind(write_after_free, "late frame"),
    "connection lost": Kind(lost_connection, "failed hand-off"),
    "connection: garbage": Kind(garbage, "broken connection"),
    "hello: hostile layout": Kind(hostile_hello, "broken connection"),
    "hello: wrong key": Kind(wrong_key, "refused connection", ("shm", "tcp")),
}
