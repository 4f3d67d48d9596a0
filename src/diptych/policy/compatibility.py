"""Whether two workers can serve in one fleet, apart from their KV layouts (`resharding.incompatibilities`)."""

from __future__ import annotations

from diptych.core.fleet import ModelInfo


def model_differences(one: ModelInfo, other: ModelInfo) -> list[str]:
    """Why these are not the same to serve. Empty: they are."""
    reasons: list[str] = []
    if one.digest != other.digest:
        reasons.append(f"the models differ: {one.digest} and {other.digest}")
    if one.max_model_len != other.max_model_len:
        reasons.append(f"the contexts differ: {one.max_model_len} and {other.max_model_len} tokens (--max-model-len)")
    return reasons
