"""Packed or not, a projection is the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from diptych.engine.torch_engine import linear
from diptych.engine.torch_engine.linear import Linear


def _absent(*_: object) -> bool:
    raise AttributeError("no such operator")


@pytest.fixture(params=["packed", "plain", "without the operators"])
def packing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    linear._packing_works.cache_clear()
    if request.param == "plain":
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    elif request.param == "without the operators":
        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", _absent)
    yield
    linear._packing_works.cache_clear()


@pytest.mark.usefixtures("packing")
@pytest.mark.parametrize("num_rows", [1, 16, 100])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections(num_rows: int, biased: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((num_rows, 48), (80, 48), (80,))
    )
    found = Linear(weight, bias if biased else None)(rows)
    wanted = functional.linear(rows.double(), weight.double(), bias.double() if biased else None)
    assert found.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.double(), wanted, rtol=0.01, atol=tolerance)
