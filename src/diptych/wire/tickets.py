"""Tickets as bytes: the claims in msgpack, and an HMAC-SHA256 over them with the fleet's key.

Whoever carries a ticket (the router) cannot read meaning into it or change it; that it is used only once
is up to the receiver, which knows the nonces that it has given out.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from diptych.core.errors import TicketError
from diptych.core.ticket import TicketClaims

PURPOSE = b"diptych ticket 1"  # keeps these MACs apart from any other use of the key
MAC_BYTES = 32


def mint(claims: TicketClaims, key: bytes) -> bytes:
    """The ticket for these claims."""
    content = msgspec.msgpack.encode(claims)
    return _mac(content, key) + content


def open_ticket(ticket: bytes, key: bytes) -> TicketClaims:
    """The claims inside. Raises TicketError if the ticket was not minted with this key, as it is."""
    mac, content = ticket[:MAC_BYTES], ticket[MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(content, key)):
        raise TicketError("this ticket was not minted by this fleet")
    try:
        return msgspec.msgpack.decode(content, type=TicketClaims)
    except (msgspec.DecodeError, ValueError) as error:
        raise TicketError(f"this ticket does not parse: {error}") from error


def _mac(content: bytes, key: bytes) -> bytes:
    return hmac.digest(key, PURPOSE + content, hashlib.sha256)
