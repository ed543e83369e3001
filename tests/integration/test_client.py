"""Job, Source and Sink together: real gRPC, real engine, threads instead of processes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from support.fabrics import RAILS
from support.pair import until_lost
from support.toy import SHAPES, ToySinkLayout, ToySourceLayout, expected_sink, toy_shard, toy_sink
from weightsync import errors
from weightsync.client import Job, Sink, Source
from weightsync.service import member
from weightsync.service.session import Session

SOURCES = 2
TIMEOUT_S = 20.0


class Fleet:
    """Two sources and replicas of two sinks each, all in this process."""

    def __init__(
        self,
        job: Job,
        *,
        mode: str = "staged",
        replicas: str = "a",
        fabric: str = "local",
        **source: Any,
    ) -> None:
        # Every rank with rails of its own, as hosts have them.
        options = {"addresses": list(RAILS[:2])} if fabric in ("tcp", "local+tcp") else {}
        self.job = job
        self.stack = ExitStack()
        self.pool = self.stack.enter_context(ThreadPoolExecutor(16))
        self.values = {n: torch.zeros(s) for n, s in SHAPES.items()}
        self.shards = [toy_shard(self.values, rank, SOURCES) for rank in range(SOURCES)]
        self.sources = [
            self.stack.enter_context(
                Source(
                    self.shards[rank], layout=ToySourceLayout(SOURCES), rank=rank,
                    world_size=SOURCES, job=job, timeout_s=TIMEOUT_S, fabric=fabric,
                    fabric_options=options, **source,
                )
            )
            for rank in range(SOURCES)
        ]  # fmt: skip
        self.live = {(r, rank): toy_sink(2) for r in replicas for rank in range(2)}
        self.sinks = {
            key: self.stack.enter_context(
                Sink(
                    live, layout=ToySinkLayout(2), replica=key[0], rank=key[1], world_size=2,
                    job=job, mode=mode, timeout_s=TIMEOUT_S, fabric=fabric,  # type: ignore[arg-type]
                    fabric_options=options,
                )
            )
            for key, live in self.live.items()
        }  # fmt: skip

    def train(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for value in self.values.values():
            value.copy_(torch.randn(value.shape, generator=generator))
        for rank, shard in enumerate(self.shards):
            for name, value in toy_shard(self.values, rank, SOURCES).items():
                shard[name].copy_(value)

    def publish(self, **kwargs: Any) -> list[Any]:
        return [f.result(TIMEOUT_S + 5) for f in self.start_publish(**kwargs)]

    def start_publish(self, **kwargs: Any) -> list[Any]:
        return [self.pool.submit(source.publish, **kwargs) for source in self.sources]

    def start_refit(self, **kwargs: Any) -> list[Any]:
        return [self.pool.submit(sink.refit, **kwargs) for sink in self.sinks.values()]

    def refit(self, **kwargs: Any) -> list[int]:
        return [f.result(TIMEOUT_S + 5) for f in self.start_refit(**kwargs)]

    def check(self) -> None:
        for (_, rank), live in self.live.items():
            for name, value in expected_sink(self.values, rank, 2).items():
                assert torch.equal(live[name].view(torch.int16), value.view(torch.int16)), name


@pytest.fixture
def job() -> Iterator[Job]:
    with Job.start() as started:
        yield started


def _failures(futures: list[Any]) -> list[BaseException]:
    return [e for f in futures if (e := f.exception(TIMEOUT_S + 5)) is not None]


@pytest.mark.parametrize("fabric", ["local", "tcp"])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_versions_arrive_cast_and_sharded(job: Job, mode: str, fabric: str) -> None:
    fleet = Fleet(job, mode=mode, replicas="ab", fabric=fabric)
    with fleet.stack:
        for step in range(1, 5):
            fleet.train(step)
            waiting = fleet.start_refit()
            reports = fleet.publish(tag=f"step {step}", until="adopted")
            assert [f.result(5) for f in waiting] == [step] * 4
            assert {r.version for r in reports} == {step}
            assert {r.tag for r in reports} == {f"step {step}"}
            fleet.check()
        assert {s.version for s in fleet.sinks.values()} == {4}
        status = job.status()
        assert status["replicas"]["a"]["serving"]
        assert status["committed_version"] == 4


def test_staged_weights_change_in_refit_only(job: Job) -> None:
    fleet = Fleet(job)
    with fleet.stack:
        fleet.train(1)
        fleet.publish()
        before = {k: {n: t.clone() for n, t in live.items()} for k, live in fleet.live.items()}
        assert all(
            torch.equal(t, before[k][n]) for k, live in fleet.live.items() for n, t in live.items()
        )
        assert all(not t.any() for live in before.values() for t in live.values())
        fleet.refit()
        fleet.check()


def test_await_and_refit_async(job: Job) -> None:
    fleet = Fleet(job)

    async def both() -> None:
        updates = [source.start_publish() for source in fleet.sources]
        reports = await asyncio.gather(*updates)  # type: ignore[arg-type]
        assert [r.version for r in reports] == [1, 1]
        found = await asyncio.gather(*(s.refit_async() for s in fleet.sinks.values()))
        assert found == [1, 1]

    with fleet.stack:
        fleet.train(1)
        asyncio.run(both())
        fleet.check()


def test_an_optimizer_step_waits_for_the_decision(job: Job) -> None:
    fleet = Fleet(job)
    with fleet.stack:
        fleet.train(1)
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        first = fleet.sources[0].start_publish()  # the other rank is late: the version stays open
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        stepped = fleet.pool.submit(optimizer.step)
        time.sleep(0.2)
        assert not stepped.done()
        fleet.sources[1].publish()
        stepped.result(5)
        assert first.wait().version == 1


def test_weights_that_change_while_open_abort_the_version(job: Job) -> None:
    fleet = Fleet(job)
    with fleet.stack:
        fleet.train(1)
        first = fleet.sources[0].start_publish()
        fleet.shards[0]["up"].add_(1.0)
        late = fleet.pool.submit(fleet.sources[1].publish)
        with pytest.raises(errors.SourceMutatedError, match="up") as caught:
            first.wait()
        assert caught.value.version == 1
        assert isinstance(late.exception(5), errors.SourceMutatedError)
        fleet.train(2)
        assert {r.version for r in fleet.publish()} == {2}
        fleet.refit()
        fleet.check()


def test_a_rank_that_does_not_publish_is_named(job: Job) -> None:
    fleet = Fleet(job)
    refused = pytest.raises(errors.VersionAbortedError, match="source 1 did not publish")
    with fleet.stack, refused:
        fleet.sources[0].publish(timeout_s=0.5)


def test_no_replica_is_no_quorum(job: Job) -> None:
    shards = toy_shard({n: torch.zeros(s) for n, s in SHAPES.items()}, 0, 1)
    source = Source(shards, layout=ToySourceLayout(1), rank=0, world_size=1, job=job)
    with source, pytest.raises(errors.NoQuorumError, match="1 complete replica"):
        source.publish(timeout_s=0.5)


def test_a_stale_version_is_refused(job: Job) -> None:
    fleet = Fleet(job)
    with fleet.stack:
        fleet.publish(version=5)
        fleet.refit()
        with pytest.raises(errors.StaleVersionError, match="not newer than 5"):
            fleet.sources[0].publish(version=5)
        assert {r.version for r in fleet.publish()} == {6}


def test_the_same_sink_twice_is_refused(job: Job) -> None:
    fleet = Fleet(job)
    with fleet.stack, pytest.raises(errors.ConfigError, match="sink a/1 has joined already"):
        Sink(toy_sink(2), layout=ToySinkLayout(2), replica="a", rank=1, world_size=2, job=job)


def test_a_version_cannot_be_overtaken_on_one_rank(job: Job) -> None:
    fleet = Fleet(job)
    with fleet.stack:
        fleet.sources[0].start_publish()
        with pytest.raises(errors.VersionError, match="still open"):
            fleet.sources[0].start_publish()
        fleet.sources[1].publish()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ("missing", errors.UnknownTensorError, "norm"),
        ("extra", errors.UnknownTensorError, "surplus"),
        ("renamed", errors.UnknownTensorError, "up_renamed"),
        ("shape", errors.LayoutError, "down"),
        ("dtype", errors.DtypeMismatchError, "embed"),
    ],
)
def test_sides_that_do_not_match_fail_with_the_tensor_named(
    job: Job, change: str, error: type[Exception], named: str
) -> None:
    layout = ToySourceLayout(1, change=change)
    shards = layout.tensors()
    live = [toy_sink(2) for _ in range(2)]
    with ExitStack() as stack:
        source = stack.enter_context(
            Source(shards, layout=layout, rank=0, world_size=1, job=job, timeout_s=10)
        )
        for rank in range(2):
            stack.enter_context(
                Sink(
                    live[rank],
                    layout=ToySinkLayout(2),
                    replica="a",
                    rank=rank,
                    world_size=2,
                    job=job,
                )
            )
        with pytest.raises(error, match=named):
            source.publish()
        assert all(not t.any() for tensors in live for t in tensors.values())


def test_a_sink_whose_tensors_are_not_its_layout_is_refused_before_it_joins(job: Job) -> None:
    live = toy_sink(2)
    live["up"] = live["up"].float()
    with pytest.raises(errors.DtypeMismatchError, match="up"):
        Sink(live, layout=ToySinkLayout(2), replica="a", rank=0, world_size=2, job=job)


def test_a_staging_budget_that_fits_no_write_is_refused(job: Job) -> None:
    with pytest.raises(errors.PlanBudgetError, match=r"staging_bytes=64 .* 4096"):
        Fleet(job, staging_bytes=64)


def test_the_staging_budget_is_kept(job: Job) -> None:
    fleet = Fleet(job, mode="in_place", staging_bytes=4096)
    with fleet.stack:
        fleet.train(1)
        waiting = fleet.start_refit()
        reports = fleet.publish()
        assert [f.result(5) for f in waiting] == [1, 1]
        assert 0 < max(r.peak_staging_bytes for r in reports) <= 4096
        fleet.check()


def test_too_little_memory_for_staged_mode_is_refused(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightsync.runtime import receiver

    monkeypatch.setattr(receiver, "available_bytes", lambda: 1000)
    fleet = Fleet(job)
    with fleet.stack, pytest.raises(errors.PlanBudgetError, match="in_place"):
        fleet.publish()


def test_a_coordinator_that_restarts_goes_on_with_its_versions(tmp_path: Path) -> None:
    url, journal = f"unix:{tmp_path}/job.sock", tmp_path / "job.db"
    job = Job.start(url, journal=journal)
    fleet = Fleet(job)
    with fleet.stack:
        fleet.train(1)
        fleet.publish()
        job.close()
        until_lost(*fleet.sources)
        with Job.start(url, journal=journal):
            assert fleet.refit() == [1, 1]  # committed before, adopted after
            fleet.check()
            fleet.train(2)
            assert {r.version for r in fleet.publish()} == {2}
            fleet.refit()
            fleet.check()
            # The sessions with the old coordinator took their threads with them.
            members = SOURCES + len(fleet.sinks)
            names = [thread.name for thread in threading.enumerate()]
            assert names.count("weightsync-lease") == names.count("weightsync-control") == members


def test_weights_are_the_users_again_when_the_coordinator_stays_away() -> None:
    job = Job.start()
    with Source(
        toy_shard({n: torch.zeros(s) for n, s in SHAPES.items()}, 0, 1),
        layout=ToySourceLayout(1), rank=0, world_size=1, job=job, timeout_s=0.5,
    ) as source:  # fmt: skip
        job.close()
        until_lost(source)
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        with pytest.raises(errors.TransferTimeoutError, match="not decided"):
            source.publish()
        torch.optim.SGD([parameter], lr=1.0).step()


def test_a_member_that_is_slow_to_join_again_answers_what_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator binds as soon as it has welcomed the last one."""

    class SlowSession(Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            time.sleep(0.3)

    url, journal = f"unix:{tmp_path}/job.sock", tmp_path / "job.db"
    job = Job.start(url, journal=journal)
    fleet = Fleet(job)
    with fleet.stack:
        monkeypatch.setattr(member, "Session", SlowSession)
        job.close()
        until_lost(*fleet.sources)
        with Job.start(url, journal=journal):
            fleet.train(1)
            assert {r.version for r in fleet.publish()} == {1}


def test_a_refit_that_runs_out_of_time_leaves_the_old_version(job: Job) -> None:
    fleet = Fleet(job)
    with fleet.stack:
        fleet.train(1)
        fleet.publish()
        first = fleet.sinks["a", 0]
        with pytest.raises(errors.TransferTimeoutError, match="not every rank"):
            first.refit(timeout_s=0.3)
        assert first.version is None
        assert fleet.refit() == [1, 1]
        fleet.check()


def test_a_refit_to_a_later_version_adopts_the_one_before_it_on_the_way(job: Job) -> None:
    """The later one is written only then."""
    fleet = Fleet(job)
    with fleet.stack:
        fleet.train(1)
        fleet.publish()
        refits = [fleet.pool.submit(s.refit, 2, timeout_s=20) for s in fleet.sinks.values()]
        fleet.train(2)
        fleet.publish()
        assert [refit.result(20) for refit in refits] == [2, 2]
        fleet.check()


def test_an_abort_of_the_next_version_leaves_a_committed_one(job: Job) -> None:
    """Rule R12 of docs/protocol.md: nobody adopted version 1 yet when version 2 is given up."""
    fleet = Fleet(job)
    with fleet.stack:
        fleet.train(1)
        fleet.publish()
        committed = {name: value.clone() for name, value in fleet.values.items()}
        fleet.train(2)
        failures = _failures(fleet.start_publish(timeout_s=1.0))
        assert len(failures) == SOURCES
        for error in failures:
            assert isinstance(error, errors.TransferTimeoutError | errors.VersionError), error
        assert fleet.refit() == [1, 1]
        fleet.values = committed
        fleet.check()


def test_a_replica_that_is_lost_does_not_hold_the_others_back() -> None:
    with Job.start(min_replicas=1) as job:
        fleet = Fleet(job, replicas="ab")
        with fleet.stack:
            fleet.train(1)
            assert {r.num_replicas for r in fleet.publish()} == {2}
            fleet.refit()
            fleet.sinks.pop(("b", 1)).close()
            fleet.train(2)
            assert {(r.version, r.num_replicas) for r in fleet.publish()} == {(2, 1)}
            whole = {key: sink for key, sink in fleet.sinks.items() if key[0] == "a"}
            assert [f.result() for f in [fleet.pool.submit(s.refit) for s in whole.values()]] == [
                2
            ] * 2
            # A new rank in its place makes the replica whole for the next version.
            fleet.sinks["b", 1] = fleet.stack.enter_context(
                Sink(
                    fleet.live["b", 1], layout=ToySinkLayout(2), replica="b", rank=1,
                    world_size=2, job=job, timeout_s=TIMEOUT_S,
                )
            )  # fmt: skip
            fleet.train(3)
            assert {(r.version, r.num_replicas) for r in fleet.publish()} == {(3, 2)}
            assert fleet.refit() == [3] * 4
            fleet.check()


def test_too_few_replicas_are_no_quorum() -> None:
    with Job.start(min_replicas=2) as job:
        fleet = Fleet(job, replicas="ab")
        with fleet.stack:
            fleet.sinks.pop(("b", 1)).close()
            fleet.train(1)
            failures = _failures(fleet.start_publish(timeout_s=1.0))
            assert len(failures) == SOURCES
            for error in failures:
                assert isinstance(error.__cause__ or error, errors.NoQuorumError), error
            assert all(sink.version is None for sink in fleet.sinks.values())


def test_without_a_coordinator_joining_fails_in_time(tmp_path: Path) -> None:
    with pytest.raises(errors.PeerLostError, match="no coordinator"):
        Source(
            toy_shard({n: torch.zeros(s) for n, s in SHAPES.items()}, 0, 1),
            layout=ToySourceLayout(1), rank=0, world_size=1, job=f"unix:{tmp_path}/none.sock",
            timeout_s=0.5,
        )  # fmt: skip


def test_nothing_is_left_behind(job: Job) -> None:
    def ours() -> set[str]:
        return {t.name for t in threading.enumerate() if t.name.startswith("weightsync")}

    before = ours()
    fleet = Fleet(job)
    with fleet.stack:
        fleet.train(1)
        fleet.publish()
        fleet.refit()
    assert ours() <= before
