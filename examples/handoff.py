"""Two processes: one makes a prompt's KV cache on two tensor ranks, the other goes on from it on a single one."""

import multiprocessing
import secrets
import tempfile
from dataclasses import replace

import numpy as np

from diptych.core.kv_layout import KVLayout
from diptych.transfer.session import KVSource, KVTarget

DECODE = KVLayout(num_layers=4, num_kv_heads=2, head_dim=8, dtype="float32", block_size=32)
PREFILL = replace(DECODE, tensor_parallel=2, block_size=16)  # one KV head on each rank
NUM_TOKENS = 100


def prefill(key, ticket, address):
    """Sends each layer as soon as both ranks have computed it, and the first token at the end."""
    with KVSource(key=key) as source, source.create_session("s1", PREFILL, ticket, address) as session:
        shape = (len(session.missing), 2, PREFILL.heads_per_rank, PREFILL.block_size, PREFILL.head_dim)
        for layer in range(PREFILL.num_layers):
            ranks = [np.full(shape, 10 * layer + rank, np.float32) for rank in range(2)]
            session.push([{layer: kv} for kv in ranks], DECODE)
        session.close(token=42, payload=b"as good as new")
        session.wait(timeout=30)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        key = secrets.token_bytes(32)
        with KVTarget(DECODE, num_blocks=64, key=key, address=f"unix:{directory}/kv.sock") as target:
            ticket = target.expect("s1", NUM_TOKENS)
            process = multiprocessing.get_context("spawn").Process(target=prefill, args=(key, ticket, target.address))
            process.start()
            pulled = target.pull("s1", timeout=60)
            last = pulled.layer(3)  # [block, K or V, head, slot, head_dim]
            by_head = last[0].mean((0, 2, 3))
            print(f"{pulled.num_tokens} tokens in blocks {pulled.blocks}; last layer by head: {by_head}")
            print(f"decode goes on from token {pulled.token.token_id}: {pulled.payload.decode()}")
            target.release("s1")
            process.join()
