"""The feed-forward part of a decoder layer: rows [T, hidden] to [T, hidden]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from diptych.engine.torch_engine.linear import Project

FeedForward = Project


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """down(silu(gate(x)) * up(x)) of Shazeer 2020. `gate_up` yields gate, then up."""

    gate_up: Project
    down: Project

    def __call__(self, rows: Tensor) -> Tensor:
        gate, up = self.gate_up(rows).chunk(2, dim=-1)
        return self.down(functional.silu(gate).mul_(up))
