"""The one screen that `diptych serve` shows: progress while loading, then what is there and how to use it."""

from __future__ import annotations

import json
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from diptych.core.fleet import Role, WorkerId, WorkerView
from diptych.core.ports import Dispatcher

EXAMPLE_TOKENS = 32


class Screen:
    """Use as a context manager from launch until the end."""

    def __init__(self, roles: dict[WorkerId, Role]) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("  {task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[stage]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[WorkerId, TaskID] = {
            worker_id: self._progress.add_task(worker_id, total=None, stage="starting") for worker_id in roles
        }

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def listening(self, flags: str) -> None:
        """Workers from elsewhere are taken in, if they are started with these flags."""
        command = f"diptych worker --role ROLE {flags}"
        self._console.print(f"  others may join: {command}", highlight=False, markup=False, soft_wrap=True)

    def loading(self, worker_id: WorkerId, done: int, total: int) -> None:
        """A worker has loaded `done` of `total` parts of its model."""
        if worker_id in self._tasks:
            self._progress.update(self._tasks[worker_id], completed=done, total=total, stage="loading")

    def joined(self, worker_id: WorkerId) -> None:
        """A worker has registered."""
        if worker_id in self._tasks:
            self._progress.update(self._tasks[worker_id], completed=1, total=1, stage="ready")

    def ready(self, url: str, name: str, dispatcher: Dispatcher, example: str) -> None:
        """Everything runs: say what there is, and how to use it."""
        self._progress.stop()
        workers = dispatcher.workers()
        longest = dispatcher.model.max_model_len
        print_ = self._console.print
        print_(f"\n  [bold]diptych[/bold] serves [bold]{name}[/bold] at [bold]{url}[/bold]/v1\n", highlight=False)
        for role in Role:
            pool = [worker for worker in workers if worker.role is role]
            if pool:
                print_(f"  {role:<8} {_pool(pool, longest)}", highlight=False, soft_wrap=True)
        print_(f"\n  Try it:\n\n{_curl(url, name, example)}\n", highlight=False, markup=False, soft_wrap=True)
        print_("  Ctrl-C ends everything.\n", highlight=False)

    def stopping(self) -> None:
        self._console.print("  ending all workers", highlight=False)


def _pool(pool: list[WorkerView], longest: int) -> str:
    """One line about the workers of one role, with their KV budget in tokens and in longest requests."""
    tokens = pool[0].num_blocks * pool[0].block_size
    names = ", ".join(f"{worker.worker_id} {worker.cut}".rstrip() for worker in pool)
    megabytes = tokens * pool[0].token_bytes / 2**20
    return (
        f"{names}: KV cache of {tokens:,} tokens each ({megabytes:,.0f} MiB), "
        f"room for {tokens / longest:.1f} requests of {longest:,} tokens"
    )


def _curl(url: str, name: str, example: str) -> str:
    messages = [{"role": "user", "content": example}]
    body = {"model": name, "messages": messages, "max_tokens": EXAMPLE_TOKENS, "temperature": 0}
    quoted = json.dumps(body).replace("'", "'\\''")
    return f"  curl -i {url}/v1/chat/completions -H 'content-type: application/json' -d '{quoted}'"
