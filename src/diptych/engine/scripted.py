"""An engine without a model: its tokens follow from the KV bytes that it reads, so wrong KV gives wrong tokens.

Each computed position writes, into every layer's K and V slots, 8 bytes that depend on its token, its
position and the layer, and that its heads share among them. The next token is a hash of all those bytes of
the whole log, read back through the block table at every step. A page that is missing, stale, foreign or
corrupt therefore changes the answer, and `expected_tokens` says, knowing nothing of pages, what the right
answer is.

A model may be cut into ranks, each with a memory of its own. The bytes of a (layer, head, position) do not
depend on the cut, and all ranks are read, those that hold the same heads as well: so wrong re-sharding
changes the answer, too.

Standard library only. It computes nothing worth waiting for; how long a step of a real model would take
is told by `step_seconds`, and spent only if a `sleep` is handed in.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from diptych.core.errors import ServingError
from diptych.core.fleet import ModelInfo
from diptych.core.kv_layout import KVLayout, KVMemory
from diptych.core.ports import AllocateKV, OnLayer, OnLost, Unwanted
from diptych.core.request import Request, SampledToken, SamplingParams
from diptych.core.sequence import Batch, ScheduledSequence
from diptych.core.sequence import Sequence as TokenSequence
from diptych.core.settings import ParallelSettings
from diptych.policy.stopping import finish_reason

ENTRY_BYTES = 8  # of one position in one layer, for K and for V each: all heads together
HEAD_FORMATS = {1: "Q", 2: "I", 4: "H", 8: "B"}  # number of heads -> struct format of one head's share
PLANES = 2  # K and V
EOS_TOKEN_ID = 0
PRINTABLE = range(32, 127)
GREEDY = SamplingParams(temperature=0.0)

# By K and V and head: of each rank that holds it, equal ones once. So there is one of each if all is well.
LayerChecksums = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptedModel:
    """What is played.

    Tokens are bytes; the outputs are printable ASCII (ids 32 to 126), and one in `eos_every` is the
    end-of-sequence token (id 0; never if `eos_every` is 0). `num_kv_heads` is a key of HEAD_FORMATS. The
    right answer depends on neither `block_size` nor `parallel`, and so they are no part of the model's digest.
    """

    name: str = "scripted"
    max_model_len: int = 4096
    block_size: int = 16
    num_layers: int = 2
    num_kv_heads: int = 2
    eos_every: int = 0
    parallel: ParallelSettings = field(default_factory=ParallelSettings)

    @property
    def info(self) -> ModelInfo:
        identity = f"{self.name} {self.max_model_len} {self.num_layers} {self.num_kv_heads} {self.eos_every}"
        return ModelInfo(
            name=self.name,
            digest=hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
            vocab_size=256,
            max_model_len=self.max_model_len,
            eos_token_ids=(EOS_TOKEN_ID,),
        )

    @property
    def layout(self) -> KVLayout:
        """Raises ValueError if the model cannot be cut like that."""
        return KVLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=ENTRY_BYTES // self.num_kv_heads,
            dtype="uint8",
            block_size=self.block_size,
            tensor_parallel=self.parallel.tensor,
            pipeline_parallel=self.parallel.pipeline,
            data_parallel=self.parallel.data,
            expert_parallel=self.parallel.expert,
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
        self._memories: tuple[KVMemory, ...] = ()
        self.model = self._script.info
        self.layout = self._script.layout

    def step_seconds(self, batch: Batch) -> float:
        """How long a real model would take for `batch`."""
        return self._cost.seconds(batch)

    def allocate_kv(self, num_blocks: int, allocate: AllocateKV) -> tuple[KVMemory, ...]:
        layout = self.layout
        sizes = [len(layout.layers_of(rank)) * num_blocks * layout.block_bytes for rank in range(layout.world_size)]
        self._memories = tuple(
            KVMemory(layout, num_blocks, allocate(size).buffer, rank) for rank, size in enumerate(sizes)
        )
        return self._memories

    def step(
        self, batch: Batch, on_layer: OnLayer | None = None, unwanted: Unwanted | None = None
    ) -> list[SampledToken | None]:
        """As the port says. Raises ServingError without KV cache or if a block table is too short."""
        if not self._memories:
            raise ServingError("the engine has no KV cache: allocate_kv comes before the first step")
        left = batch
        for layer in range(self.layout.num_layers):
            left = _without(left, unwanted)
            if not left.rows:
                break
            for row in left.rows:
                if len(row.sequence.block_table) * self.layout.block_size < row.end:
                    raise ServingError(f"request {row.sequence.request_id} has no block for position {row.end - 1}")
                _write(self._ranks(row, layer), layer, row)
            self._spend(self.step_seconds(left) / self.layout.num_layers, unwanted)
            if on_layer is not None:
                on_layer(layer)
        return [self._sample(row) if row.samples and row in left.rows else None for row in batch.rows]

    def _spend(self, seconds: float, unwanted: Unwanted | None) -> None:
        """Take that long, if time is to be taken at all, but wake up when rows become unwanted."""
        if self._sleep is None:
            return
        if unwanted is None:
            self._sleep(seconds)
        else:
            unwanted.wait(seconds)

    def forget(self, request_id: str) -> None:
        """Nothing is remembered beyond the log."""

    def watch(self, lost: OnLost) -> None:
        """There is nothing that could break down."""

    def close(self) -> None:
        """Let go of the KV memory, which may be mapped by whoever allocated it."""
        self._memories = ()

    def _ranks(self, row: ScheduledSequence, layer: int) -> tuple[KVMemory, ...]:
        """The memories that hold a layer of this row's sequence."""
        first = self.layout.rank(row.sequence.data_rank, self.layout.stage_of(layer), 0)
        return self._memories[first : first + self.layout.tensor_parallel]

    def _sample(self, row: ScheduledSequence) -> SampledToken:
        checksums = [_read(self._ranks(row, layer), layer, row) for layer in range(self.layout.num_layers)]
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
    kept = [[0] * (PLANES * model.num_kv_heads) for _ in range(model.num_layers)]
    position = 0
    while finish_reason(sequence, (EOS_TOKEN_ID,)) is None:
        fresh = sequence.token_ids[position:]
        for layer, checksums in enumerate(kept):
            entries = _entries(fresh, position, layer, model.num_kv_heads)
            checksums[:] = map(zlib.crc32, entries, checksums)
        position += len(fresh)
        read = [tuple((checksum,) for checksum in checksums) for checksums in kept]
        token = _choose(read, sampling, sequence.num_output_tokens, model.eos_every)
        sequence.token_ids.append(token.token_id)
    return sequence.output_token_ids


def _without(batch: Batch, unwanted: Unwanted | None) -> Batch:
    """What is still wanted of a batch; the rest is let go."""
    request_ids = frozenset() if unwanted is None else unwanted.take()
    if unwanted is None or not request_ids:
        return batch
    unwanted.let_go(request_ids)
    return Batch(tuple(row for row in batch.rows if row.sequence.request_id not in request_ids))


def _entries(token_ids: Sequence[int], first_position: int, layer: int, num_heads: int) -> list[bytes]:
    """The vectors of consecutive positions in one layer: K by head, then V by head.

    K (and V) of a position are the ENTRY_BYTES of a sum of multiples of odd 64-bit constants, cut by head."""
    found: list[bytes] = []
    for plane in range(PLANES):
        place = (PLANES * layer + plane + 1) * 0x9E3779B97F4A7C15 + first_position * 0xC2B2AE3D27D4EB4F
        words = [
            ((token + 1) * 0xD6E8FEB86659FD93 + index * 0xC2B2AE3D27D4EB4F + place) & 0xFFFFFFFFFFFFFFFF
            for index, token in enumerate(token_ids)
        ]
        shares = memoryview(struct.pack(f"<{len(words)}Q", *words)).cast(HEAD_FORMATS[num_heads])
        found += [shares[head::num_heads].tobytes() for head in range(num_heads)]
    return found


def _spans(layout: KVLayout, row: ScheduledSequence, start: int) -> list[tuple[int, int]]:
    """For each block that holds positions of [start, row.end): the byte offset of the first one's first vector
    within a layer, and the bytes of one head's vectors."""
    spans: list[tuple[int, int]] = []
    while start < row.end:
        index, slot = divmod(start, layout.block_size)
        end = min(row.end, (index + 1) * layout.block_size)
        first = row.sequence.block_table[index] * layout.block_bytes + layout.offset(0, 0, slot)
        spans.append((first, (end - start) * layout.vector_bytes))
        start = end
    return spans


def _parts(memory: KVMemory) -> Iterator[tuple[int, int]]:
    """For each K and V of each head of a rank: its number among all of the model's, and its offset in a block."""
    layout = memory.layout
    for plane in range(PLANES):
        for place, head in enumerate(layout.heads_of(memory.rank)):
            yield plane * layout.heads + head, layout.offset(plane, place)


def _write(memories: Sequence[KVMemory], layer: int, row: ScheduledSequence) -> None:
    """Compute the KV of a row's positions in one layer."""
    layout = memories[0].layout
    entries = _entries(row.sequence.token_ids[row.start : row.end], row.start, layer, layout.heads)
    spans = _spans(layout, row, row.start)
    for memory in memories:
        pages = memory.layer(layer)
        for number, base in _parts(memory):
            done = 0
            for first, size in spans:
                pages[base + first : base + first + size] = entries[number][done : done + size]
                done += size


def _read(memories: Sequence[KVMemory], layer: int, row: ScheduledSequence) -> LayerChecksums:
    """Checksums over the row's whole context in one layer."""
    layout = memories[0].layout
    found: list[set[int]] = [set() for _ in range(PLANES * layout.heads)]
    spans = _spans(layout, row, 0)
    for memory in memories:
        pages = memory.layer(layer)
        for number, base in _parts(memory):
            checksum = 0
            for first, size in spans:
                checksum = zlib.crc32(pages[base + first : base + first + size], checksum)
            found[number].add(checksum)
    return tuple(tuple(sorted(checksums)) for checksums in found)


def _choose(
    checksums: Sequence[LayerChecksums], sampling: SamplingParams, num_outputs: int, eos_every: int
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
