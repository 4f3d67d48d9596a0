"""One message of every type that travels between processes."""

from __future__ import annotations

from diptych.core.fleet import KVEndpoint, Manifest, ModelInfo, Role, WorkerStats
from diptych.core.kv_layout import KVLayout
from diptych.core.request import FinishReason, Preference, Request, SampledToken, SamplingParams, TokenOutput
from diptych.transfer import frames
from diptych.wire import messages

TOKEN = SampledToken(17, -0.25, ((17, -0.25), (3, -1.5)))
OUTPUT = TokenOutput("r1", 4, TOKEN, FinishReason.LENGTH)
REQUEST = Request(
    request_id="r1",
    prompt_token_ids=(1, 2, 2**31),
    sampling=SamplingParams(temperature=0.7, seed=2**64 - 1, logit_bias=((5, -100.0),), logprobs=2),
    prefer=Preference.SPLIT,
    cache_salt="tenant é",
)
ENDPOINT = KVEndpoint(transport="shm", address="unix:/run/kv.sock")
MANIFEST = Manifest(
    model=ModelInfo(name="m", digest="abc", vocab_size=32, max_model_len=64, eos_token_ids=(2,)),
    layout=KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, dtype="bfloat16", block_size=16),
    num_blocks=10,
    endpoints=(ENDPOINT,),
    host="a",
)

FROM_WORKER: list[messages.FromWorker] = [
    messages.WantEpoch("w", 6),
    messages.Loading("w", 1, 3),
    messages.Hello(messages.WIRE_VERSION, "w", 7, 4242, Role.PREFILL, MANIFEST),
    messages.Leaving(),
    messages.Heartbeat(WorkerStats(running=1, prefill_rate=1e3), 5, (("late frame", 2),)),
    messages.Granted("r1", b"\x00ticket\xff", 16),
    messages.Prefilled(OUTPUT, 16, 0.5, 1.25),
    messages.Tokens([OUTPUT, TokenOutput("r2", 0, SampledToken(0))]),
    messages.Failed("r1", "no_room", "no room"),
    messages.KVEvents([b"\x01" * 16], []),
]
TO_WORKER: list[messages.ToWorker] = [
    messages.NewEpoch(7),
    messages.Welcome(1),
    messages.Refused("another model"),
    messages.Ping(5),
    messages.Serve(REQUEST, (9, 8)),
    messages.Reserve(REQUEST, ()),
    messages.Prefill(REQUEST, (), b"ticket", ENDPOINT),
    messages.Abort("r1"),
    messages.WarmUp("d0", 2, ENDPOINT),
    messages.Shutdown(),
]
FROM_SOURCE: list[frames.FromSource] = [
    frames.PushHello(1, "p0", MANIFEST.layout, "model", False),
    frames.Join(b"link"),
    frames.Probe(1 << 20),
    frames.Begin("r1", b"nonce", 3),
    frames.Pages("r1", b"nonce", 3, 1, 1, 0, 4, bytes(range(16)), 256),
    frames.Close("r1", b"nonce", 3, 5, TOKEN, b"and this"),
    frames.Stopped("r1", b"nonce"),
]
FROM_TARGET: list[frames.FromTarget] = [
    frames.PushWelcome(MANIFEST.layout, 12, 1, b"link"),
    frames.NixlWelcome(b"metadata", (1 << 40, 1 << 41), 1 << 42),
    frames.Probed(),
    frames.Refused("another model"),
    frames.Joined(),
    frames.Go("r1", b"nonce"),
    frames.Accepted("r1", b"nonce"),
    frames.Rejected("r1", b"nonce", "kv_corrupt", "pages of layer 1 are corrupt"),
    frames.Cancel("r1", b"nonce"),
]
