"""Inputs of frame parsers that once led somewhere new, kept in `corpus/` and replayed by `test_fuzz_corpus.py`.

    PYTHONPATH=src python tests/wire/fuzz_corpus.py --seconds 60

spoils what is kept (and one message of every type), and adds what makes a parser answer as nothing before it did.
An answer is the type of the message that was understood, or the reason why none was; anything but a PeerError is a
bug, which is kept, too. One file for each parser: a line has the answer, a tab, and the input in hexadecimal.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from wire_examples import FROM_SOURCE, FROM_TARGET, FROM_WORKER, TO_WORKER

from diptych.core.errors import PeerError
from diptych.core.kv_layout import KVLayout
from diptych.core.ticket import TicketClaims
from diptych.transfer import frames
from diptych.wire import messages
from diptych.wire.blocking import BlockingConnection, socket_pair
from diptych.wire.codec import Decoder, encode_frame, seal
from diptych.wire.handshake import ConnectorSide, ListenerSide
from diptych.wire.tickets import MAC_BYTES, PURPOSE, mint, open_ticket

CORPUS = Path(__file__).parent / "corpus"
KEY = b"k" * 32
MAX_BYTES = 2000  # of one input
CLAIMS = TicketClaims(
    request_id="r1",
    worker_id="d0",
    epoch=3,
    blocks=(4, 5),
    first_block=1,
    num_tokens=20,
    layout=KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, dtype="bfloat16", block_size=16),
    model_digest="model",
    salt="",
    nonce=b"n" * 16,
)

# What of a reason is not about the input's kind: values, types, and places other than fields.
VARYING = [
    (re.compile(r"unknown field.*", re.DOTALL), "unknown field"),
    (re.compile(r"(Expected|got|required field) `[^`]*`"), r"\1 _"),
    (re.compile(r"\(.*\)"), ""),
    (re.compile(r"'.*'", re.DOTALL), "_"),
    (re.compile(r"(0x)?[0-9][0-9a-f]*"), "_"),
    (re.compile(r"in position _: .*"), ""),
]

Parser = Callable[[bytes], object]


def _message(union: Any) -> Parser:
    """Undamaged, so that it is the message that has to be understood."""
    decoder: Decoder[Any] = Decoder(union)
    return lambda content: decoder.decode(seal(content))


def _data_connection(content: bytes) -> object:
    """Everything that comes over a connection until its end; the last message, if all are understood."""
    ours, theirs = socket_pair()
    connection: BlockingConnection[Any] = BlockingConnection(theirs, frames.FromSource)
    last = None
    try:
        ours.sendall(content)
        ours.close()
        while (message := connection.receive()) is not None:
            last = message
    finally:
        connection.close()
    return last


def _ticket(content: bytes) -> object:
    """With the fleet's own MAC, as if a worker of the fleet had minted it."""
    return open_ticket(hmac.digest(KEY, PURPOSE + content, hashlib.sha256) + content, KEY)


PARSERS: dict[str, Parser] = {
    "from-source": _message(frames.FromSource),
    "from-target": _message(frames.FromTarget),
    "from-worker": _message(messages.FromWorker),
    "to-worker": _message(messages.ToWorker),
    "data-connection": _data_connection,
    "ticket": _ticket,
    "handshake-opening": lambda content: ListenerSide(KEY).reply(content),
    "handshake-reply": lambda content: ConnectorSide(KEY).answer(content),
}


def answer(parser: str, content: bytes) -> str:
    """What a parser makes of an input, without what differs from input to input."""
    try:
        return type(PARSERS[parser](content)).__name__
    except PeerError as error:
        reason = error.message
        for pattern, instead in VARYING:
            reason = pattern.sub(instead, reason)
        return f"{type(error).__name__}: {reason}"


def kept(parser: str) -> Iterator[tuple[str, bytes]]:
    """(answer, input) of all lines."""
    path = CORPUS / f"{parser}.txt"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        said, _, content = line.rpartition("\t")
        yield said, bytes.fromhex(content)


def seeds(parser: str) -> list[bytes]:
    """Inputs that are as they should be."""
    of = {
        "from-source": FROM_SOURCE,
        "from-target": FROM_TARGET,
        "from-worker": FROM_WORKER,
        "to-worker": TO_WORKER,
    }
    if parser in of:
        return [msgspec.msgpack.encode(message) for message in of[parser]]
    if parser == "data-connection":
        return [b"".join(encode_frame(message) for message in FROM_SOURCE if not isinstance(message, frames.Pages))]
    if parser == "ticket":
        return [mint(CLAIMS, KEY)[MAC_BYTES:]]
    opening = ConnectorSide(KEY).opening
    return [opening if parser == "handshake-opening" else ListenerSide(KEY).reply(opening)]


def spoiled(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, left out, repeated, or taken from another input."""
    wrong = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 5))):
        start = dice.randrange(len(wrong) + 1)
        end = min(start + dice.choice((1, 1, 2, 8, 64)), len(wrong))
        from_other = dice.randrange(len(other) + 1)
        wrong[start:end] = dice.choice(
            (
                b"",
                dice.randbytes(end - start),
                bytes(wrong[start:end]) * 2,
                other[from_other : from_other + dice.choice((1, 9, 40))],
                dice.choice((b"\xc0", b"\xc4\xff", b"\xdf\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"\x81")),
            )
        )
    return bytes(wrong[:MAX_BYTES])


def grow(parser: str, seconds: float, dice: random.Random) -> list[tuple[str, bytes]]:
    """What is to be added."""
    inputs = {*(content for _, content in kept(parser)), *seeds(parser)}
    known = {said for said, _ in kept(parser)}
    found: list[tuple[str, bytes]] = []
    until = time.monotonic() + seconds
    candidates = list(inputs)
    pool = sorted(inputs)
    while time.monotonic() < until:
        content = candidates.pop() if candidates else spoiled(dice.choice(pool), dice.choice(pool), dice)
        try:
            said = answer(parser, content)
        except Exception as bug:  # whatever it is, it must not happen
            said = f"BUG: {type(bug).__name__}"
        if said not in known:
            known.add(said)
            pool.append(content)
            found.append((said, content))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=30, help="for all parsers together")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    CORPUS.mkdir(exist_ok=True)
    for parser in PARSERS:
        found = grow(parser, chosen.seconds / len(PARSERS), random.Random(f"{chosen.seed} {parser}"))
        with (CORPUS / f"{parser}.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{said}\t{content.hex()}\n" for said, content in found)
        print(f"{parser}: {len(found)} added, {sum(said.startswith('BUG') for said, _ in found)} of them bugs")


if __name__ == "__main__":
    main()
