"""Moving KV pages from the memory of one worker into that of another.

For use outside of diptych's workers there is `transfer.session`, with

    KVSource, SourceSession    the prefill side: create_session, push, close, wait, abort, drain
    KVTarget, PulledSession    the decode side: expect, pull, release, abort, drain
    Blocks                     who gives the target's blocks out

Everything else is what workers, and these sessions, are made of:

session_source, session_target  the two sides of public sessions
arrays      numpy arrays and torch tensors, seen as pages
leases      deadlines of sessions
frames      what is said on a data connection
sender      PushLink: the source's side, one per target
pushes      the requests that a link is at work on
streams     the connections of a link
pieces      in what portions a plan's bytes are moved
places      many byte ranges at once
nixl        pages written by NIXL; nixl_link: whether that is worth it
writers     how bytes reach the target: mapped memory, or in the frame
receiver    KVReceiver: the target's side, one per worker
peer        one source's link, as its target sees it
incoming    what the receiver knows of each ticket it granted
expected    what a ticket's writer has to send, and where it belongs
local       the in-process endpoint
memory      KV memory that other processes can map
digest      what a page's bytes amount to
faulty      a writer that spoils pages on purpose, for tests
"""
