"""A source against a coordinator of a script that says the wrong thing at the wrong time."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from support.pair import join_source
from weightsync.errors import TransferTimeoutError
from weightsync.service import weightsync_pb2 as pb
from weightsync.service import weightsync_pb2_grpc as rpc

TIMEOUT_S = 20.0


class Late(rpc.CoordinatorServicer):
    """Answers the first publish only when the second one is there, on every stream it can."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[tuple[int, pb.MemberMessage]] = queue.SimpleQueue()
        self.streams: list[queue.SimpleQueue[pb.CoordinatorMessage | None]] = []

    def Join(  # type: ignore[override]  # noqa: N802
        self, requests: Iterator[pb.MemberMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.CoordinatorMessage]:
        number, outbox = len(self.streams), queue.SimpleQueue()
        self.streams.append(outbox)
        context.add_callback(lambda: outbox.put(None))

        def read() -> None:
            try:
                for message in requests:
                    self.heard.put((number, message))
            except grpc.RpcError:
                pass

        pool = ThreadPoolExecutor(1)
        pool.submit(read)
        yield pb.CoordinatorMessage(welcome=pb.Welcome(incarnation=1, lease_s=1000.0))
        while (message := outbox.get()) is not None:
            yield message
        pool.shutdown(wait=False)

    def next(self, kind: str) -> tuple[int, pb.MemberMessage]:
        while True:
            number, message = self.heard.get(timeout=TIMEOUT_S)
            if message.WhichOneof("kind") == kind:
                return number, message


@pytest.fixture
def late(tmp_path: Path) -> Iterator[tuple[Late, str]]:
    server, servicer = grpc.server(ThreadPoolExecutor(4)), Late()
    rpc.add_CoordinatorServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{tmp_path / 'job.sock'}")
    server.start()
    yield servicer, f"unix:{tmp_path / 'job.sock'}"
    for outbox in servicer.streams:
        outbox.put(None)
    server.stop(None).wait(TIMEOUT_S)


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_version(
    late: tuple[Late, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync.service.source._GRACE_S", 0.5)
    server, url = late
    with join_source(url) as source:
        with pytest.raises(TransferTimeoutError, match="did not reach"):
            source.publish(timeout_s=0.1)
        stream, _ = server.next("publish")
        update = source.start_publish()
        # Meant for the version that was given up: it may have been committed without us.
        commit = pb.Decide(version=1, commit=True, num_replicas=1)
        server.streams[stream].put(pb.CoordinatorMessage(write=pb.Write(version=1, deadline_s=9)))
        server.streams[stream].put(pb.CoordinatorMessage(decide=commit))
        after, _ = server.next("publish")
        assert after != stream
        server.streams[after].put(
            pb.CoordinatorMessage(decide=pb.Decide(version=2, commit=True, num_replicas=1))
        )
        assert update.wait(timeout_s=TIMEOUT_S).version == 2
