"""Keys, whose they are, and what follows from that."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from front_fakes import FakeDispatcher, ask

from diptych.core.errors import ConfigError, OverloadedError, UnavailableError
from diptych.core.fleet import RouterStats
from diptych.front.tenants import TenantKeys, read_tenants
from diptych.policy.admission import TenantLimits
from diptych.telemetry.prometheus import MAX_LABELS, ServerMetrics

COMPLETION = {"model": "tiny", "prompt": "abc", "max_tokens": 2}
FILE = f"""
[anybody]
max_requests = 3

[[tenant]]
name = "search"
keys = ["sk-1", "sk-2"]
weight = 2
max_requests = 5
max_queued_tokens = 1000
kv_share = 0.5

[[tenant]]
name = "chat"
key_sha256 = ["{hashlib.sha256(b"hidden").hexdigest()}"]
cache = "team"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def completion(dispatcher: FakeDispatcher, key: str, body: dict[str, Any] | None = None, **settings: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"}
    return ask(dispatcher, "/v1/completions", body or COMPLETION, headers=headers, **settings)


def test_a_file_of_tenants(tmp_path: Path) -> None:
    tenants = read_tenants(write(tmp_path / "tenants.toml", FILE))
    assert tenants.limits == {
        "search": TenantLimits(weight=2, max_requests=5, max_queued_tokens=1000, kv_share=0.5),
        "chat": TenantLimits(),
    }
    assert tenants.anybody == TenantLimits(max_requests=3)
    dispatcher = FakeDispatcher()
    for key in ("sk-1", "sk-2", "hidden"):
        assert completion(dispatcher, key, keys=tenants.keys).status_code == 200
    assert completion(dispatcher, "sk-3", keys=tenants.keys).status_code == 401
    requests = [stream.request for stream in dispatcher.streams]
    assert [request.tenant for request in requests] == ["search", "search", "chat"]
    assert [request.cache_salt for request in requests] == ["tenant:search", "tenant:search", "cache:team"]
    assert dispatcher.checked == ["search", "search", "chat"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[tenant]]\nname = 'a'", "needs a key"),
        ("[[tenant]]\nname = 'a'\nkeys = ['']", "empty key"),
        ("[[tenant]]\nname = 'a b'\nkeys = ['x']", "name"),
        ("[[tenant]]\nname = 'a'\nkeys = ['x']\n[[tenant]]\nname = 'a'\nkeys = ['y']", "twice"),
        ("[[tenant]]\nname = 'a'\nkeys = ['x']\n[[tenant]]\nname = 'b'\nkeys = ['x']", "one of its own"),
        ("[[tenant]]\nname = 'a'\nkey_sha256 = ['abc']", "64 digits"),
        ("[[tenant]]\nname = 'a'\nkeys = ['x']\nweight = 0", "weight"),
        ("[[tenant]]\nname = 'a'\nkeys = ['x']\nkv_share = 2", "kv_share"),
        ("[anybody]\nmax_request = 1", "max_request"),
        ("[", "tenants.toml"),
    ],
)
def test_a_file_that_is_wrong_says_where(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_tenants(write(tmp_path / "tenants.toml", text))
    with pytest.raises(ConfigError, match="none.toml"):
        read_tenants(tmp_path / "none.toml")


@pytest.mark.fault(57)
def test_a_client_divides_its_tenants_namespace_and_never_leaves_it() -> None:
    dispatcher = FakeDispatcher()
    keys = TenantKeys.of(("one", "two"))
    for key in ("one", "two"):
        for salt in (None, "x", "../two"):
            body = COMPLETION | ({} if salt is None else {"cache_salt": salt})
            assert completion(dispatcher, key, body, keys=keys).status_code == 200
    salts = [stream.request.cache_salt for stream in dispatcher.streams]
    assert len(set(salts)) == 6
    assert {salt.partition("/")[0] for salt in salts[:3]}.isdisjoint(salt.partition("/")[0] for salt in salts[3:])
    for wrong in ("", "x" * 129, 1, "\0"):
        assert completion(dispatcher, "one", COMPLETION | {"cache_salt": wrong}, keys=keys).status_code == 400


def test_priority_and_timeout_reach_the_router() -> None:
    dispatcher = FakeDispatcher()
    headers = {"x-request-timeout-ms": "2500"}
    assert ask(dispatcher, "/v1/completions", COMPLETION | {"priority": -3}, headers=headers).status_code == 200
    request = dispatcher.streams[0].request
    assert (request.priority, request.timeout) == (-3, 2.5)
    assert ask(dispatcher, "/v1/completions", COMPLETION | {"priority": 9}).status_code == 400


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "1e3", "ten", "9" * 11, "٣"])
def test_timeouts_that_make_no_sense(text: str) -> None:
    headers: Any = {"x-request-timeout-ms": text.encode()}
    response = ask(FakeDispatcher(), "/v1/completions", COMPLETION, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout-ms")


@pytest.mark.parametrize(
    ("code", "status"), [("request_timeout", 504), ("first_token_timeout", 504), ("queue_timeout", 503)]
)
def test_deadlines_of_the_router_are_gateway_timeouts_unless_nobody_had_room(code: str, status: int) -> None:
    dispatcher = FakeDispatcher(failures={0: UnavailableError("too late", retry_after=1.0, code=code)})
    response = ask(dispatcher, "/v1/completions", COMPLETION)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["retry-after"]


@pytest.mark.fault(24)
@pytest.mark.fault(60)
def test_who_has_no_chance_is_refused_before_the_body_is_looked_at() -> None:
    dispatcher = FakeDispatcher(closed=OverloadedError("full", retry_after=2.4))
    response = ask(dispatcher, "/v1/completions", b"this is no JSON")
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2400")
    assert dispatcher.streams == []
    metrics = ask(dispatcher, "/metrics", method="GET")
    assert metrics.status_code == 200


@pytest.mark.fault(55)
def test_metrics_tell_only_so_many_tenants_and_reasons_apart() -> None:
    metrics = ServerMetrics(list, RouterStats)
    for number in range(10 * MAX_LABELS):
        metrics.tenant_request(f"tenant-{number}")
        metrics.refused(f"code-{number}")
    lines = metrics.render().decode().splitlines()
    for name, label in (("diptych_tenant_requests_total", "tenant"), ("diptych_refused_total", "reason")):
        values = {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith(name + "{")}
        assert len(values) == MAX_LABELS + 1
        assert values[f'{name}{{{label}="other"}}'] == 9 * MAX_LABELS
