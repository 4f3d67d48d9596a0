"""An engine without a model: its tokens follow from the KV bytes that it reads, so wrong KV gives wrong tokens.

Each computed position writes, into every layer's K and V slot, 8 bytes that depend on its token, its
position and the layer. The next token is a hash of all those bytes of the whole log, read back through
the block table at every step. A page that is missing, stale, foreign or corrupt therefore changes the
answer, and `expected_tokens` says, knowing nothing of pages, what the right answer is.

Standard library only. It computes nothing worth waiting for; how long a step of a real model would take
is told by `step_seconds`, and spent only if a `sleep` is handed in.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from diptych.core.errors import ServingError
from diptych.core.fleet import ModelInfo
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.ports import AllocateKV, OnLayer
from diptych.core.request import Request, SampledToken, SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence
from diptych.core.sequence import Sequence as TokenSequence
from diptych.policy.stopping import finish_reason

ENTRY_BYTES = 8  # of one position in one layer, for K and for V each: one head of 8 numbers of uint8
EOS_TOKEN_ID = 0
PRINTABLE = range(32, 127)
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedModel:
    """What is played.

    Tokens are bytes; the outputs are printable ASCII (ids 32 to 126), and one in `eos_every` is the
    end-of-sequence token (id 0; never if `eos_every` is 0).
    """

    name: str = "scripted"
    max_model_len: int = 4096
    block_size: int = 16
    num_layers: int = 2
    eos_every: int = 0

    @property
    def info(self) -> ModelInfo:
        identity = f"{self.name} {self.max_model_len} {self.num_layers} {self.eos_every}"
        return ModelInfo(
            name=self.name,
            digest=hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
            vocab_size=256,
            max_model_len=self.max_model_len,
            eos_token_ids=(EOS_TOKEN_ID,),
        )

    @property
    def layout(self) -> KVLayout:
        return KVLayout(
            num_layers=self.num_layers,
            num_kv_heads=1,
            head_dim=ENTRY_BYTES,
            dtype="uint8",
            block_size=self.block_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds that a step of a real model would take, as a sum of three parts.

    The defaults are those of a model of some 30 million parameters on one CPU core.
    """

    step: float = 4e-3  # of any step: reading the weights once
    token: float = 2e-4  # of each computed token: its matrix products
    pair: float = 5e-8  # of each (token, earlier token) pair: attention

    def seconds(self, batch: Batch) -> float:
        pairs = sum(row.num_tokens * (row.start + row.end) / 2 for row in batch.rows)
        return self.step + self.token * batch.num_tokens + self.pair * pairs


class ScriptedEngine:
    """Implements `core.ports.Engine`. With `sleep`, a step takes its modelled time, layer by layer.

    Of the sampling parameters it honours temperature (0, or not), seed, stop_token_ids, min_tokens and
    logprobs (made up, but well-formed).
    """

    def __init__(
        self,
        model: ScriptedModel | None = None,
        cost: StepCost | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._script = model or ScriptedModel()
        self._cost = cost or StepCost()
        self._sleep = sleep
        self._kv: KVMemory | None = None
        self.model = self._script.info
        self.layout = self._script.layout

    def step_seconds(self, batch: Batch) -> float:
        """How long a real model would take for `batch`."""
        return self._cost.seconds(batch)

    def allocate_kv(self, num_blocks: int, allocate: AllocateKV) -> tuple[KVMemory, ...]:
        layout = self._script.layout
        self._kv = KVMemory(layout, num_blocks, allocate(layout.num_layers * num_blocks * layout.block_bytes).buffer)
        return (self._kv,)

    def step(self, batch: Batch, on_layer: OnLayer | None = None) -> list[SampledToken | None]:
        """As the port says. Raises ServingError without KV cache or if a block table is too short."""
        kv = self._kv
        if kv is None:
            raise ServingError("the engine has no KV cache: allocate_kv comes before the first step")
        for row in batch.rows:
            if len(row.sequence.block_table) * kv.layout.block_size < row.end:
                raise ServingError(f"request {row.sequence.request_id} has no block for position {row.end - 1}")
        for layer in range(kv.layout.num_layers):
            for row in batch.rows:
                _write(kv, layer, row)
            if self._sleep is not None:
                self._sleep(self.step_seconds(batch) / kv.layout.num_layers)
            if on_layer is not None:
                on_layer(layer)
        return [self._sample(kv, row) if row.samples else None for row in batch.rows]

    def forget(self, request_id: str) -> None:
        """Nothing is remembered beyond the log."""

    def close(self) -> None:
        """Let go of the KV memory, which may be mapped by whoever allocated it."""
        self._kv = None

    def _sample(self, kv: KVMemory, row: ScheduledSequence) -> SampledToken:
        checksums = [_read(kv, layer, row) for layer in range(kv.layout.num_layers)]
        sampling, num_outputs = row.sequence.request.sampling, row.sequence.num_output_tokens
        return _choose(checksums, sampling, num_outputs, self._script.eos_every)


def expected_tokens(
    prompt_token_ids: Sequence[int],
    num_tokens: int,
    sampling: SamplingParams = GREEDY,
    model: ScriptedModel | None = None,
) -> list[int]:
    """The right answer: `num_tokens` outputs, fewer if a stop token comes up. Knows nothing of pages or steps."""
    model = model or ScriptedModel()
    request = Request(
        request_id="expected",
        prompt_token_ids=tuple(prompt_token_ids),
        sampling=replace(sampling, max_tokens=num_tokens),
    )
    sequence = TokenSequence.from_log(request)
    keys, values = [0] * model.num_layers, [0] * model.num_layers
    position = 0
    while finish_reason(sequence, (EOS_TOKEN_ID,)) is None:
        fresh = sequence.token_ids[position:]
        for layer in range(model.num_layers):
            keys[layer] = zlib.crc32(_entries(fresh, position, layer, is_value=False), keys[layer])
            values[layer] = zlib.crc32(_entries(fresh, position, layer, is_value=True), values[layer])
        position += len(fresh)
        checksums = list(zip(keys, values, strict=True))
        token = _choose(checksums, sampling, sequence.num_output_tokens, model.eos_every)
        sequence.token_ids.append(token.token_id)
    return sequence.output_token_ids


def _entries(token_ids: Sequence[int], first_position: int, layer: int, *, is_value: bool) -> bytes:
    """K or V of consecutive positions in one layer: ENTRY_BYTES each, the multiples of odd 64-bit constants."""
    place = (2 * layer + is_value + 1) * 0x9E3779B97F4A7C15 + first_position * 0xC2B2AE3D27D4EB4F
    words = [
        ((token + 1) * 0xD6E8FEB86659FD93 + index * 0xC2B2AE3D27D4EB4F + place) & 0xFFFFFFFFFFFFFFFF
        for index, token in enumerate(token_ids)
    ]
    return struct.pack(f"<{len(words)}Q", *words)


def _slots(kv: KVMemory, row: ScheduledSequence, start: int) -> Iterator[tuple[int, int, int, int]]:
    """For each block that holds positions of [start, row.end): the byte offsets within a layer of
    their first K and first V entry, the number of bytes of either, and the first of the positions."""
    block_size = kv.layout.block_size
    while start < row.end:
        index, slot = divmod(start, block_size)
        end = min(row.end, (index + 1) * block_size)
        key = row.sequence.block_table[index] * kv.layout.block_bytes + slot * ENTRY_BYTES
        yield key, key + block_size * ENTRY_BYTES, (end - start) * ENTRY_BYTES, start
        start = end


def _write(kv: KVMemory, layer: int, row: ScheduledSequence) -> None:
    """Compute the KV of a row's positions in one layer."""
    memory = kv.layer(layer)
    token_ids = row.sequence.token_ids[row.start : row.end]
    keys = _entries(token_ids, row.start, layer, is_value=False)
    values = _entries(token_ids, row.start, layer, is_value=True)
    for key, value, size, position in _slots(kv, row, row.start):
        source = (position - row.start) * ENTRY_BYTES
        memory[key : key + size] = keys[source : source + size]
        memory[value : value + size] = values[source : source + size]


def _read(kv: KVMemory, layer: int, row: ScheduledSequence) -> tuple[int, int]:
    """Checksums over all K and all V of the row's whole context in one layer."""
    memory = kv.layer(layer)
    keys = values = 0
    for key, value, size, _ in _slots(kv, row, 0):
        keys = zlib.crc32(memory[key : key + size], keys)
        values = zlib.crc32(memory[value : value + size], values)
    return keys, values


def _choose(
    checksums: Sequence[tuple[int, int]], sampling: SamplingParams, num_outputs: int, eos_every: int
) -> SampledToken:
    """The token that the KV (its checksums by layer) and the sampling parameters lead to."""
    draw = (sampling.seed, num_outputs) if sampling.temperature > 0 else ()
    digest = hashlib.blake2b(repr((tuple(checksums), draw)).encode(), digest_size=16).digest()
    choice, chance = struct.unpack("<QQ", digest)
    masked = {EOS_TOKEN_ID, *sampling.stop_token_ids} if num_outputs < sampling.min_tokens else set[int]()
    if eos_every and chance % eos_every == 0 and EOS_TOKEN_ID not in masked:
        token_id = EOS_TOKEN_ID
    else:
        allowed = [token for token in PRINTABLE if token not in masked] or PRINTABLE
        token_id = allowed[choice % len(allowed)]
    if sampling.logprobs is None:
        return SampledToken(token_id)
    logprob = -(1 + chance % 64) / 64
    likely = tuple(((token_id + rank) % 256, logprob - rank) for rank in range(sampling.logprobs))
    return SampledToken(token_id, logprob, likely)
