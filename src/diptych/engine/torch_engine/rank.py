"""A rank process of a worker (`python -m diptych.engine.torch_engine.rank DESCRIPTOR`): computes one shard of a model.

It does what its leader says over the socket of that descriptor, and lives exactly as long as the leader holds the
other end.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import sys
import threading
import traceback
from dataclasses import dataclass

import torch

from diptych.core.errors import ConfigError, DiptychError, EngineCorrupt, ProtocolError
from diptych.core.sequence import Batch
from diptych.engine.torch_engine import rank_messages as messages
from diptych.engine.torch_engine.checkpoint import open_checkpoint
from diptych.engine.torch_engine.links import connect
from diptych.engine.torch_engine.mirror import Mirror
from diptych.engine.torch_engine.shard import Shard
from diptych.engine.torch_engine.stage import DENSE_LIMIT, Stage, open_weights
from diptych.wire.blocking import BlockingConnection

Leader = BlockingConnection[messages.ToRank]


def main() -> None:
    """Serve the leader until it is gone. Does not return."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(sock,), daemon=True).start()
    leader: Leader = BlockingConnection(sock, messages.ToRank, messages.MAX_MESSAGE_BYTES)
    try:
        _Rank.load(leader).serve()
    except DiptychError as error:
        _last_word(leader, messages.Failed(error.code, error.message))
    except Exception as error:  # the edge of the process; without this rank the others cannot go on either
        traceback.print_exc()
        _last_word(leader, messages.Failed("engine_lost", f"{type(error).__name__}: {error}"))
    os._exit(1)  # the links to other ranks may be in any state, and would wait for each other


def _end_with(leader: socket.socket) -> None:
    """End this process when the leader's end of the socket is closed, even in the middle of a collective."""
    hang_up = select.poll()
    hang_up.register(leader, 0)  # POLLHUP alone, which is always reported
    hang_up.poll()
    os._exit(0)


def _last_word(leader: Leader, failed: messages.Failed) -> None:
    try:
        leader.send(failed)
    except OSError:
        print(f"diptych: {failed.message}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Rank:
    leader: Leader
    shard: Shard
    stage: Stage
    mirror: Mirror

    @classmethod
    def load(cls, leader: Leader) -> _Rank:
        """Take the settings from the leader, meet the other ranks and load this one's share."""
        start = leader.receive()
        if not isinstance(start, messages.Start):
            raise ProtocolError("a rank begins with Start")
        if start.cores:
            os.sched_setaffinity(0, start.cores)
        torch.set_num_threads(1)
        settings = start.settings
        checkpoint = open_checkpoint(settings.model, settings.dtype, settings.max_model_len)
        shard = Shard(checkpoint.config, checkpoint.layout(settings.block_size, settings.parallel), start.rank)
        device = _device(settings.device, start.rank)
        links = connect(shard, start.rendezvous, device)
        files = open_weights(checkpoint, device)
        stage = Stage(files, shard, device, links, lambda done, total: leader.send(messages.Loading(done, total)))
        leader.send(messages.Ready(files.digest() if start.rank == 0 else None))
        return cls(leader, shard, stage, Mirror())

    def serve(self) -> None:
        """Do what the leader says, for as long as it is there."""
        while (order := self.leader.receive()) is not None:
            match order:
                case messages.Step():
                    self._step(order)
                case messages.Forget(request_id):
                    self.stage.forget(request_id)
                    self.mirror.forget(request_id)
                case messages.TakeKV():
                    self._take_kv(order)
                case messages.Start():
                    raise ProtocolError("a rank starts once")

    def _take_kv(self, order: messages.TakeKV) -> None:
        descriptor = self.leader.receive_descriptor()
        try:
            buffer = memoryview(mmap.mmap(descriptor, order.nbytes))
        finally:
            os.close(descriptor)
        self.stage.take_kv(order.num_blocks, buffer, DENSE_LIMIT // self.shard.layout.world_size)
        self.leader.send(messages.KVTaken())

    def _step(self, order: messages.Step) -> None:
        batch = Batch(tuple(map(self.mirror.row, order.rows)))
        on_layer = self._report_layer if order.reports_layers and batch.rows else None
        try:
            samples = self.stage.step(batch, on_layer)
        except EngineCorrupt as error:
            self.leader.send(messages.StepCorrupt(list(error.request_ids)))
        else:
            self.leader.send(messages.StepDone(samples if self.shard.samples else []))

    def _report_layer(self, index: int) -> None:
        self.leader.send(messages.LayerDone(self.shard.layers[index]))


def _device(kind: str, rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device(kind)
    if rank >= torch.cuda.device_count():
        raise ConfigError(f"rank {rank} has no CUDA device: there are {torch.cuda.device_count()}")
    torch.cuda.set_device(rank)
    return torch.device(kind, rank)


if __name__ == "__main__":
    main()
