"""A Dispatcher without workers, and tokenizers small enough to be made on the spot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from diptych.core.errors import DiptychError
from diptych.core.fleet import (
    BreakerState,
    ModelInfo,
    Readiness,
    Role,
    Route,
    RouterStats,
    WorkerState,
    WorkerStats,
    WorkerView,
)
from diptych.core.request import FinishReason, Request, SampledToken, TokenOutput
from diptych.core.timeline import Timeline
from diptych.front.app import create_app
from diptych.front.chat_template import ChatTemplate
from diptych.front.http_protocol import ConnectionLimits
from diptych.front.server import bind, serve
from diptych.front.settings import FrontSettings
from diptych.front.tenants import TenantKeys
from diptych.front.tokenizer import TextCodec, Tokenizer

MODEL = ModelInfo(name="tiny", digest="0", vocab_size=512, max_model_len=256, eos_token_ids=(0,))
Script = Callable[[Request], Sequence[int]]


def shifted_prompt(request: Request) -> list[int]:
    """The prompt again and again: simple, and different for different prompts."""
    prompt = request.prompt_token_ids
    return [prompt[i % len(prompt)] for i in range(request.sampling.max_tokens)]


class FakeStream:
    def __init__(self, dispatcher: FakeDispatcher, request: Request, tokens: Sequence[int]) -> None:
        self.request = request
        self.route = Route("decode-0", "prefill-0", "local")
        self.num_cached_tokens = 0
        self.timeline = Timeline(arrived=0.0, split=True)
        self.cancelled = asyncio.Event()
        self._dispatcher = dispatcher
        self._tokens = tokens
        self._sent = 0

    def __aiter__(self) -> AsyncIterator[TokenOutput]:
        return self._run()

    async def _run(self) -> AsyncIterator[TokenOutput]:
        sampling = self.request.sampling
        for index, token_id in enumerate(self._tokens[: sampling.max_tokens]):
            gate = self._dispatcher.gates.get(index)
            await (gate.wait() if gate is not None else asyncio.sleep(0))
            failure = self._dispatcher.failures.get(index)
            if failure is not None:
                raise failure
            if self.cancelled.is_set():
                return
            if index == 0:
                self.num_cached_tokens = self._dispatcher.num_cached_tokens
                self.timeline.queue_seconds, self.timeline.prefill_seconds = 0.001, 0.02
            self.timeline.token(0.03 + 0.01 * index)
            yield self._output(index, token_id)
        self.timeline.finished = 1.0

    def _output(self, index: int, token_id: int) -> TokenOutput:
        sampling, finish = self.request.sampling, None
        stops = sampling.stop_token_ids + (() if sampling.ignore_eos else self._dispatcher.model.eos_token_ids)
        if token_id in stops:
            finish = FinishReason.STOP
        elif index + 1 == sampling.max_tokens:
            finish = FinishReason.LENGTH
        token = SampledToken(token_id)
        if sampling.logprobs is not None:
            tops = tuple((token_id + rank, -0.5 - rank) for rank in range(sampling.logprobs))
            token = SampledToken(token_id, -0.5, tops)
        return TokenOutput(self.request.request_id, index, token, finish)

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class FakeDispatcher:
    """Yields `script(request)`. `gates[i]` must be set before token i comes; `failures[i]` comes instead of it."""

    script: Script = shifted_prompt
    model: ModelInfo = MODEL
    gates: dict[int, asyncio.Event] = field(default_factory=dict)
    failures: dict[int, DiptychError] = field(default_factory=dict)
    refusal: DiptychError | None = None
    closed: DiptychError | None = None  # what `check` raises
    checked: list[str] = field(default_factory=list)
    accept: int | None = None  # how many requests before `refusal`
    num_cached_tokens: int = 0
    ready: Readiness = Readiness.YES
    streams: list[FakeStream] = field(default_factory=list)
    submitted: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self, tenant: str) -> None:
        self.checked.append(tenant)
        if self.closed is not None:
            raise self.closed

    def submit(self, request: Request) -> FakeStream:
        if self.refusal is not None and len(self.streams) >= (self.accept or 0):
            raise self.refusal
        stream = FakeStream(self, request, self.script(request))
        self.streams.append(stream)
        self.submitted.set()
        return stream

    def workers(self) -> list[WorkerView]:
        stats = WorkerStats(running=1, waiting=2, blocks_used=3, blocks_cached=4)
        return [
            _worker("prefill-0", Role.PREFILL, WorkerState.READY, WorkerStats()),
            _worker("decode-0", Role.DECODE, WorkerState.LOST, stats),
        ]

    def stats(self) -> RouterStats:
        return RouterStats(
            running=1,
            waiting=2,
            waiting_tokens=30,
            retried=4,
            moved=6,
            ignored=5,
            worker_breakers={"decode-0": BreakerState.HALF_OPEN},
            pair_breakers={("prefill-0", "decode-0"): BreakerState.OPEN},
        )

    def alive(self) -> bool:
        return True

    def readiness(self) -> Readiness:
        return self.ready


def _worker(worker_id: str, role: Role, state: WorkerState, stats: WorkerStats) -> WorkerView:
    return WorkerView(
        worker_id=worker_id,
        role=role,
        state=state,
        epoch=7,
        pid=11,
        cut="tp4 ep4",
        num_blocks=9,
        stats=stats,
        turned_away=(("late frame", 2), ("used ticket", 1)),
    )


SAMPLE = [
    "hello world, how are you?",
    "the cat sat on the mat",
    "naïve café 你好 世界 😀👩‍👩‍👧 ñandú",
    "stop STOP\n\nEND",
] * 4
CHAT_TEMPLATE = "{{ preamble }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
EOS = 0


@cache
def byte_level_backend() -> tokenizers.Tokenizer:
    """A byte-level BPE of 512 entries or fewer, in which characters beyond ASCII take several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE, trainer)
    return backend


def byte_level_tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_backend(), ChatTemplate(CHAT_TEMPLATE))


@cache
def sentence_piece_backend() -> tokenizers.Tokenizer:
    """As in Llama 2: spaces are U+2581, unknown characters fall back to one token per byte."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in "\u2581abcdefghijklmnopqrstuvwxyz":
        vocab[piece] = len(vocab)
    merges = [("\u2581", "a"), ("t", "h"), ("th", "e"), ("\u2581", "the")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def says(text: str) -> Script:
    """A dispatcher's script that answers `text` and then the end token."""
    return lambda request: [*byte_level_tokenizer().encode(text), EOS]


def front_app(dispatcher: FakeDispatcher, codec: TextCodec | None = None, **settings: Any) -> Any:
    names = settings.pop("served_model_names", ("tiny",))
    keys = TenantKeys.of(settings.pop("api_keys", ()))
    front = FrontSettings(**{"served_model_names": names, "keys": keys} | settings)
    return create_app(dispatcher, codec or byte_level_tokenizer(), front)


@asynccontextmanager
async def running_front(
    dispatcher: FakeDispatcher,
    codec: TextCodec | None = None,
    connections: ConnectionLimits | None = None,
    **settings: Any,
) -> AsyncIterator[str]:
    """The URL of a real server on a port of its own."""
    app = front_app(dispatcher, codec, **settings)
    async with serve(app, bind("127.0.0.1", 0), grace_seconds=1, limits=connections) as server:
        yield server.url


async def until(happened: Callable[[], bool]) -> None:
    """Let the loop go on until it has happened, for which there is no event."""
    async with asyncio.timeout(20):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def ask(
    dispatcher: FakeDispatcher,
    path: str,
    body: Any = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    **settings: Any,
) -> httpx.Response:
    """One request without a socket. `body` is JSON, or bytes as they are."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(front_app(dispatcher, **settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            sent = {"content-type": "application/json"} | (headers or {})
            return await client.request(method, path, content=content, headers=sent)

    return asyncio.run(send())


def events_of(body: str) -> list[Any]:
    """The events of a stream: parsed, but `[DONE]` as it is."""
    lines = body.split("\n\n")
    assert lines[-1] == ""
    assert all(line.startswith("data: ") for line in lines[:-1])
    texts = [line.removeprefix("data: ") for line in lines[:-1]]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]
