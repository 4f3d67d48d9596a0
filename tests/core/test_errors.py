"""What a client is told: every error has a code, a status and a message of its own."""

from __future__ import annotations

import pytest

from diptych.core.errors import DiptychError, EngineCorrupt, OverloadedError, RequestError


def kinds_below(kind: type[DiptychError]) -> list[type[DiptychError]]:
    return [found for below in kind.__subclasses__() for found in (below, *kinds_below(below))]


KINDS = [kind for kind in kinds_below(DiptychError) if kind is not EngineCorrupt]  # which says its own message


def test_every_kind_has_its_own_code() -> None:
    codes = [DiptychError.code, *(kind.code for kind in KINDS)]
    assert len(codes) > 10
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_more_exact_code_can_be_given(kind: type[DiptychError]) -> None:
    needed = {"retry_after": 2.0} if issubclass(kind, OverloadedError) else {}
    error = kind("why", code="exact", **needed)
    assert (error.code, error.message, str(error)) == ("exact", "why", "why")
    assert kind.code != "exact"


def test_request_errors_name_the_field() -> None:
    error = RequestError("no such model", param="model", status=404)
    assert (error.status, error.param) == (404, "model")
    assert RequestError.status == 400
