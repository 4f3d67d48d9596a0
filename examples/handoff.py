"""Two processes: one makes the KV cache of a prompt, the other goes on from it. Prints what was handed over."""

import multiprocessing
import secrets
import tempfile

import numpy as np

from diptych.core.kv_layout import KVLayout
from diptych.transfer.session import KVSource, KVTarget

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=8, dtype="float32", block_size=16)
NUM_TOKENS = 100


def prefill(key, ticket, address):
    """Sends each layer as soon as it is computed, and the first token at the end."""
    with KVSource(key=key) as source, source.create_session("s1", LAYOUT, ticket, address) as session:
        for layer in range(LAYOUT.num_layers):
            shape = (len(session.missing), 2, LAYOUT.num_kv_heads, LAYOUT.block_size, LAYOUT.head_dim)
            session.push({layer: np.full(shape, layer, np.float32)})
        session.close(token=42, payload=b"as good as new")
        session.wait(timeout=30)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        key = secrets.token_bytes(32)
        with KVTarget(LAYOUT, num_blocks=64, key=key, address=f"unix:{directory}/kv.sock") as target:
            ticket = target.expect("s1", NUM_TOKENS)
            process = multiprocessing.get_context("spawn").Process(target=prefill, args=(key, ticket, target.address))
            process.start()
            pulled = target.pull("s1", timeout=60)
            layers = [float(pulled.layer(layer).mean()) for layer in range(LAYOUT.num_layers)]
            print(f"{pulled.num_tokens} tokens in blocks {pulled.blocks}, layers {layers}")
            print(f"decode goes on from token {pulled.token.token_id}: {pulled.payload.decode()}")
            target.release("s1")
            process.join()
