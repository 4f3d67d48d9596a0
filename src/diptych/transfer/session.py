"""Handing a sequence's KV cache over, for use outside of diptych's own workers: the public API.

    prefill process                                      decode process

                                                         target = KVTarget(layout, num_blocks, key=key,
                                                                           address="unix:/run/decode.sock")
                          <-- ticket, target.address --- ticket = target.expect("s1", num_tokens)
    source = KVSource(key=key)
    session = source.create_session("s1", layout, ticket, address)
    session.push(kv)      ----------- pages ---------->  written into reserved blocks, verified one by one
    session.close(token)  ----------- the end -------->  pulled = target.pull("s1")
    session.wait()        <---------- accepted --------  pulled.layer(0), pulled.token, pulled.payload
                                                         target.release("s1")

Tickets are small opaque bytes that may travel by any road; each is good for one session, once. `push` takes
numpy arrays, torch tensors or a `KVMemory`: everything at once, or layer by layer (`push({3: layer_3})`) and
in runs of blocks as they are computed.

**Re-sharding.** Each side has a layout of its own (`core.kv_layout`): its cut into tensor, pipeline and data
parallel ranks and its block size; only the model has to be the same. `push` takes a list with the KV of each
rank, `pull` gives each rank's, and every byte that the target lacks moves once, from a rank that has it to each
rank that wants it. Only tokens move: the slots past the last one stay as they were. `examples/handoff.py` hands
KV of two tensor ranks over to one.

**What is certain.** `pull` returns KV of which every page has the digest that its source computed, also
across re-sharding (digests cover bytes in the order of tokens and heads, not in that of memory); anything
else is a TransferError on both sides. A block is given to somebody else only when nobody can write to it any
more, and `wait` returns (or raises) only when nobody reads the pushed pages any more. The states in between
are those of `policy.handoff` (`SourceSession.state`).

**When something goes wrong.** An abort on either side, a lost process and a lease that ends reach the other
side at once; errors are TransferError with these codes:

    kv_corrupt          pages arrived that are not what was sent
    transfer_failed     the other side is lost, or broke the rules
    ticket_refused      used, revoked, forged, or of an earlier life of the target
    handoff_abandoned   its source gave it up                               (at the target)
    cancelled           its target gave it up                               (at the source)
    aborted             it was given up on this side
    lease_expired       it was not over (source) or not pulled (target) in time
    draining, closed    the target takes nothing in any more
    unknown_session     nobody expects it here, or it was over long ago
"""

from __future__ import annotations

from diptych.transfer.session_source import KVSource, SourceSession
from diptych.transfer.session_target import Blocks, KVTarget, PulledSession

__all__ = ["Blocks", "KVSource", "KVTarget", "PulledSession", "SourceSession"]
