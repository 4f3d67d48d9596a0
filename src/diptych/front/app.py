"""The web application: routes, and what is wired to what."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

import diptych
from diptych.core.errors import DiptychError, RequestError, UnavailableError
from diptych.core.fleet import Readiness, WorkerView
from diptych.core.ports import Dispatcher
from diptych.front.disconnect import ClientGone
from diptych.front.errors import json_response, on_diptych_error, on_disconnect, on_http_exception, on_unexpected
from diptych.front.json_body import read_json_object
from diptych.front.middleware import ApiKeys, RequestIds
from diptych.front.openai_request import RequestBuilder, check_model, template_messages
from diptych.front.prompt_encoder import PromptEncoder
from diptych.front.sampling import check_token_ids
from diptych.front.schema import DetokenizeBody, TokenizeBody, parse_body
from diptych.front.serving import GenerationRoutes
from diptych.front.settings import FrontSettings
from diptych.front.text_checks import check_text
from diptych.front.tokenizer import TextCodec
from diptych.telemetry.prometheus import ServerMetrics

PROTECTED = ("/v1/", "/tokenize", "/detokenize")
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WORKERS_RETRY_SECONDS = 1.0


def create_app(dispatcher: Dispatcher, codec: TextCodec, settings: FrontSettings) -> Starlette:
    """The front as an ASGI application, over a router that is already running.

    Every answer has `x-request-id`; every error has OpenAI's shape.
    """
    metrics = ServerMetrics(dispatcher.workers, dispatcher.stats)
    encoder = PromptEncoder(codec, dispatcher.model.max_model_len)
    builder = RequestBuilder(encoder, dispatcher.model, settings)
    generate = GenerationRoutes(dispatcher, codec, builder, settings, metrics)
    text = TokenizerRoutes(dispatcher, encoder, settings)
    status = StatusRoutes(dispatcher, settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        encoder.close()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", generate.chat, methods=["POST"]),
            Route("/v1/completions", generate.completion, methods=["POST"]),
            Route("/v1/models", status.models),
            Route("/v1/models/{name:path}", status.one_model),
            Route("/tokenize", text.tokenize, methods=["POST"]),
            Route("/detokenize", text.detokenize, methods=["POST"]),
            Route("/health", status.ready),
            Route("/ready", status.ready),
            Route("/live", status.live),
            Route("/version", status.version),
            Route("/metrics", status.metrics),
            Route("/fleet", status.fleet),
        ],
        middleware=[
            Middleware(RequestIds),
            Middleware(ApiKeys, keys=settings.keys, protected=PROTECTED),
        ],
        exception_handlers={
            DiptychError: on_diptych_error,
            HTTPException: on_http_exception,
            ClientDisconnect: on_disconnect,
            ClientGone: on_disconnect,
            Exception: on_unexpected,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class TokenizerRoutes:
    """/tokenize and /detokenize, in the shapes that vLLM gave them."""

    def __init__(self, dispatcher: Dispatcher, encoder: PromptEncoder, settings: FrontSettings) -> None:
        self._model = dispatcher.model
        self._encoder = encoder
        self._settings = settings

    async def tokenize(self, http: HttpRequest) -> Response:
        body, _ = parse_body(await read_json_object(http, self._settings), TokenizeBody)
        self._check_model(body.model)
        if body.prompt is not None and body.messages is None:
            check_text(body.prompt, "prompt")
            [token_ids] = await self._encoder.encode_texts([body.prompt], body.add_special_tokens is not False)
        elif body.messages is not None and body.prompt is None:
            messages = template_messages(body.messages)
            token_ids = await self._encoder.encode_chat(messages, body.add_generation_prompt is not False)
        else:
            raise RequestError("give prompt or messages", param="prompt", code="missing_required_parameter")
        answer = {"tokens": token_ids, "count": len(token_ids), "max_model_len": self._model.max_model_len}
        return json_response(answer)

    async def detokenize(self, http: HttpRequest) -> Response:
        body, _ = parse_body(await read_json_object(http, self._settings), DetokenizeBody)
        self._check_model(body.model)
        check_token_ids(tuple(body.tokens), self._model.vocab_size, "tokens")
        return json_response({"prompt": self._encoder.codec.decode(body.tokens)})

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            check_model(name, self._settings)


class StatusRoutes:
    """What can be asked about the server itself."""

    def __init__(self, dispatcher: Dispatcher, settings: FrontSettings, metrics: ServerMetrics) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._metrics = metrics
        self._created = int(time.time())

    async def models(self, http: HttpRequest) -> Response:
        return json_response({"object": "list", "data": [self._model(n) for n in self._settings.served_model_names]})

    async def one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        check_model(name, self._settings)
        return json_response(self._model(name))

    async def live(self, http: HttpRequest) -> Response:
        """Only this process: restarting it is the cure if this fails."""
        if not self._dispatcher.alive():
            raise UnavailableError("the router's loop does not beat", retry_after=WORKERS_RETRY_SECONDS, code="stuck")
        return json_response({"status": "ok"})

    async def ready(self, http: HttpRequest) -> Response:
        """Whether a request sent now would be served, and as it is meant to be."""
        readiness = self._dispatcher.readiness() if self._dispatcher.alive() else Readiness.NO
        if readiness is Readiness.NO:
            raise UnavailableError(readiness.reason, retry_after=WORKERS_RETRY_SECONDS)
        why = {"reason": readiness.reason} if readiness.reason else {}
        return json_response({"status": readiness} | why)

    async def version(self, http: HttpRequest) -> Response:
        return json_response({"version": diptych.__version__})

    async def metrics(self, http: HttpRequest) -> Response:
        return Response(self._metrics.render(), headers={"content-type": METRICS_TYPE})

    async def fleet(self, http: HttpRequest) -> Response:
        return json_response({"workers": [describe_worker(worker) for worker in self._dispatcher.workers()]})

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "diptych",
            "max_model_len": self._dispatcher.model.max_model_len,
        }


def describe_worker(worker: WorkerView) -> dict[str, Any]:
    """One entry of `/fleet`. Blocks used are those of live requests; cached ones are free to evict."""
    return {
        "id": worker.worker_id,
        "role": worker.role,
        "state": worker.state,
        "pid": worker.pid,
        "epoch": worker.epoch,
        "cut": worker.cut,
        "kv_blocks_total": worker.num_blocks,
        "kv_blocks_used": worker.stats.blocks_used,
        "kv_blocks_cached": worker.stats.blocks_cached,
        "running": worker.stats.running,
        "waiting": worker.stats.waiting,
    }
