"""The HTTP front: OpenAI's API on one side, `core.ports.Dispatcher` on the other.

A request passes `json_body` -> `schema` -> `openai_request` -> `generation` -> `answers`. Nothing below
this package doubts client input, and nothing above `core` is known here but `telemetry`.
"""
