"""What happens between two layers of a step."""

from __future__ import annotations

from diptych.core.errors import StepAbandoned
from diptych.core.ports import Flag, OnLayer


def unless_given_up(given_up: Flag | None, on_layer: OnLayer | None) -> OnLayer:
    """`on_layer` (None: nothing), which is not called any more once the flag is raised, but raises StepAbandoned."""

    def after_layer(layer: int) -> None:
        if given_up is not None and given_up.is_set():
            raise StepAbandoned(f"the step was given up in layer {layer}")
        if on_layer is not None:
            on_layer(layer)

    return after_layer
