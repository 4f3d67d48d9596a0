"""Moving KV pages from the memory of one worker into that of another.

frames      what is said on a data connection
sender      PushLink: the source's side, one per target
receiver    KVReceiver: the target's side, one per worker
incoming    what the receiver knows of each ticket it granted
local       the in-process endpoint
writers     how bytes reach the target: mapped memory, or in the frame
memory      KV memory that other processes can map
digest      what a page's bytes amount to
faulty      a writer that spoils pages on purpose, for tests
"""
