"""Values of the coordinator's core: what it is told to do, its rules, members and versions."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from weightsync.service import weightsync_pb2 as pb
from weightsync.service.digests import by_sink

__all__ = [
    "WIRE_VERSION",
    "Action",
    "Binding",
    "CoreOptions",
    "Disconnect",
    "Log",
    "MakePlan",
    "Member",
    "OpenVersion",
    "Persist",
    "Phase",
    "Roster",
    "Send",
    "adopted_by",
    "problem",
]

WIRE_VERSION = 3


class Phase(enum.Enum):
    """Where the open version stands. DECIDED and CLOSED are the absence of an open version."""

    OPEN = "open"  # some source has published
    ARMING = "arming"  # all have; sinks make room
    WRITING = "writing"


@dataclass(frozen=True)
class Send:
    """Send `message` to the member on stream `member`."""

    member: int
    message: pb.CoordinatorMessage


@dataclass(frozen=True)
class Disconnect:
    """End the stream of `member` after what was sent to it."""

    member: int


@dataclass(frozen=True)
class Persist:
    """Record a decision durably before any later action is carried out."""

    version: int
    commit: bool
    reason: str


@dataclass(frozen=True)
class MakePlan:
    """Plan the transfer between these manifests and answer with `planned`."""

    epoch: int
    sources: tuple[tuple[str, bytes], ...]
    sinks: tuple[tuple[str, bytes], ...]
    staging_bytes: int
    fabrics: frozenset[str]  # of the sinks


Action = Send | Disconnect | Persist | MakePlan


@dataclass(frozen=True)
class CoreOptions:
    """Rules of one job.

    Args:
        min_replicas: Fewest complete replicas that a version needs to be committed.
        lease_s: A member that is silent for longer is lost and fenced.
        timeout_s: Deadline of a version whose publisher names none.
    """

    min_replicas: int = 1
    lease_s: float = 10.0
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Log:
    """What the coordinator remembers over a restart.

    Args:
        incarnation: Counts starts of the coordinator.
        last_version: Newest decided version, 0 for none.
        committed_version: Newest committed version, 0 for none.
        commits: Versions that were committed.
    """

    incarnation: int = 1
    last_version: int = 0
    committed_version: int = 0
    commits: frozenset[int] = frozenset()


@dataclass
class Member:
    """One joined process and what the core knows of it."""

    id: int
    hello: pb.Hello
    last_seen: float
    state: pb.SinkState.ValueType = pb.IDLE
    version: int = 0  # of `state`
    active: int = 0
    is_ready: bool = False  # waits in refit to apply `version`
    seconds: pb.SinkSeconds = field(default_factory=pb.SinkSeconds)  # of `active`

    @property
    def is_source(self) -> bool:
        """Whether it publishes."""
        return self.hello.role == pb.SOURCE

    @property
    def key(self) -> tuple[int, str, int]:
        """Its place in the job: side, replica, rank."""
        return (self.hello.role, self.hello.replica, self.hello.rank)

    @property
    def label(self) -> str:
        """How messages name it."""
        if self.is_source:
            return f"source {self.hello.rank}"
        return f"sink {self.hello.replica}/{self.hello.rank}"


def problem(error: str, message: str) -> pb.Problem:
    """What went wrong, for a message: the name of an error class, and its text."""
    return pb.Problem(error=error, message=message)


def adopted_by(members: Iterable[Member], version: int) -> pb.Adopted:
    """What sources hear when the fleet serves a version: the longest of each stage of its sinks."""
    found = [m.seconds for m in members if not m.is_source and m.active == version]
    slowest = pb.SinkSeconds(
        fill=max((s.fill for s in found), default=0.0),
        verify=max((s.verify for s in found), default=0.0),
        pause=max((s.pause for s in found), default=0.0),
    )
    return pb.Adopted(version=version, slowest=slowest)


@dataclass
class Binding:
    """One plan bound to one set of members."""

    epoch: int
    sources: list[int]  # member ids by source rank
    sinks: list[int]  # member ids by sink index
    plan_digest: str = ""
    ready: set[int] = field(default_factory=set)
    descriptors: dict[int, bytes] = field(default_factory=dict)
    hops: dict[int, frozenset[int]] = field(default_factory=dict)  # sink that passes on -> to whom
    connected: set[int] = field(default_factory=set)
    is_bound: bool = False
    sender_number: dict[int, int] = field(init=False)  # of members as in the plan: sinks behind

    def __post_init__(self) -> None:
        """Number the members."""
        members = [*self.sources, *self.sinks]
        self.sender_number = {member_id: number for number, member_id in enumerate(members)}

    def set_hops(self, hops: Mapping[int, Iterable[int]]) -> None:
        """Take note of the plan's hops, by sink index."""
        self.hops = {
            self.sinks[sink]: frozenset(self.sinks[other] for other in others)
            for sink, others in hops.items()
        }

    @property
    def writers(self) -> list[int]:
        """Members that connect to sinks: all sources, and the sinks that pass on."""
        return [*self.sources, *sorted(self.hops)]


@dataclass
class OpenVersion:
    """The version between its first publish and its decision."""

    version: int
    deadline: float
    phase: Phase = Phase.OPEN
    binding: Binding | None = None  # set with ARMING; outlives the job's when a sink is lost
    published: set[int] = field(default_factory=set)
    replicas: dict[str, list[int]] = field(default_factory=dict)  # still taking part
    armed: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    voted: set[int] = field(default_factory=set)
    digests: dict[int, pb.Digests] = field(default_factory=dict)  # by number of the sender
    is_told: bool = False  # what sinks have to compare with

    def ranks(self) -> set[int]:
        """Sinks that still take part."""
        return {i for ranks in self.replicas.values() for i in ranks}

    def all_armed(self) -> bool:
        """Whether every sink that takes part has made room. Costs nothing until it can be so."""
        num_ranks = sum(map(len, self.replicas.values()))
        return len(self.armed) >= num_ranks and self.armed >= self.ranks()

    def all_voted(self) -> bool:
        """Whether all writes are reported and all that take part have voted; cheap until then."""
        num_ranks = sum(map(len, self.replicas.values()))
        # A source that was lost after its last write completed cannot change the outcome.
        return (
            len(self.voted) >= num_ranks
            and self.written >= self.published
            and self.voted >= self.ranks()
        )

    def passing_on(self) -> set[int]:
        """Sinks that still take part and pass on."""
        return self.ranks() & self.binding.hops.keys() if self.binding is not None else set()

    def expects(self) -> Iterator[tuple[int, pb.Expect]]:
        """Say once, when all have written, what each sink that takes part has to compare with."""
        if self.is_told or self.binding is None or self.phase is not Phase.WRITING:
            return
        if not self.written >= self.published or self._is_fed_by(
            self.binding.hops.keys() - self.written
        ):
            return
        self.is_told = True
        found = by_sink(self.digests)
        taking_part = self.ranks()
        for number, member_id in enumerate(self.binding.sinks):
            if member_id in taking_part:
                yield member_id, pb.Expect(version=self.version, digests=found.get(number))

    def waits_for(self, ranks: Iterable[int]) -> bool:
        """Whether a rank that still takes part gets something from these that they may yet fail.

        Not only until they have written: it compares with what its sender read, and that this was
        right is known by the sender's own vote.
        """
        return self._is_fed_by(set(ranks) - self.voted)

    def _is_fed_by(self, ranks: set[int]) -> bool:
        """Whether a rank that still takes part gets something from these, through others too."""
        if self.binding is None:
            return False
        left = self.ranks()
        seen, todo = set(ranks), list(ranks)
        while todo:
            others = self.binding.hops.get(todo.pop(), frozenset())
            if not left.isdisjoint(others):
                return True
            todo += others - seen
            seen |= others
        return False


class Roster:
    """Who is here: members by stream, and the groups they make.

    Groups are made once per change: a job asks for them with every message of every member.
    """

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self.members = MappingProxyType(self._members)
        self.num_changes = 0
        self._sources: list[Member] = []
        self._replicas: dict[str, list[Member]] = {}

    def add(self, member: Member) -> None:
        """A member joined."""
        self._members[member.id] = member
        self._group()

    def remove(self, member_id: int) -> Member:
        """A member is gone."""
        member = self._members.pop(member_id)
        self._group()
        return member

    def _group(self) -> None:
        self.num_changes += 1
        self._sources, self._replicas = [], {}
        for member in sorted(self._members.values(), key=lambda m: m.key):
            if member.is_source:
                self._sources.append(member)
            else:
                self._replicas.setdefault(member.hello.replica, []).append(member)

    def replicas(self) -> dict[str, list[Member]]:
        """Sink members by replica, each by rank."""
        return self._replicas

    def replica(self, name: str) -> list[Member]:
        """The members of one replica, by rank."""
        return self._replicas.get(name, [])

    def sources(self) -> list[Member]:
        """Source members, by rank."""
        return self._sources

    def complete_sides(self, min_replicas: int) -> tuple[list[int], list[int]] | None:
        """Streams of all sources and of all complete replicas, or None while some are missing."""
        sources = self.sources()
        if not sources or len(sources) != sources[0].hello.world_size:
            return None
        complete = [r for r in self.replicas().values() if len(r) == r[0].hello.world_size]
        if len(complete) < max(1, min_replicas):
            return None
        return [m.id for m in sources], [m.id for ranks in complete for m in ranks]

    def identity(self, ids: Iterable[int]) -> frozenset[tuple[tuple[int, str, int], int]]:
        """Who these streams are, over reconnects of the same processes."""
        members = [self.members[i] for i in ids]
        return frozenset((m.key, m.hello.generation) for m in members)

    def join_problem(self, member: Member) -> tuple[str, str] | None:
        """Error class and text why a member may not join, or None."""
        hello = member.hello
        if hello.wire_version != WIRE_VERSION:
            return (
                "ConfigError",
                f"{member.label} speaks wire version {hello.wire_version}, this coordinator "
                f"{WIRE_VERSION}; install the same weightsync on both",
            )
        if hello.rank >= hello.world_size:
            return "ConfigError", f"{member.label}: rank outside world size {hello.world_size}"
        for other in self.members.values():
            if other.hello.role != hello.role or other.hello.replica != hello.replica:
                continue
            if other.key == member.key and other.hello.generation != hello.generation:
                return (
                    "ConfigError",
                    f"{member.label} has joined already (generation {other.hello.generation}); "
                    "give every process its own replica and rank",
                )
            if other.hello.world_size != hello.world_size:
                return (
                    "ConfigError",
                    f"{member.label} says world size {hello.world_size}, {other.label} says "
                    f"{other.hello.world_size}",
                )
        return None

    def describe(self, reply: pb.StatusReply) -> None:
        """Add sources and replicas to a status; a replica serves when its ranks agree."""
        settled = (pb.IDLE, pb.FILLING, pb.PREPARED, pb.COMMITTED, pb.ACTIVE)
        for name, members in sorted(self.replicas().items()):
            versions = {m.active for m in members}
            serving = (
                len(members) == members[0].hello.world_size
                and len(versions) == 1
                and 0 not in versions
                and all(m.state in settled for m in members)
            )
            states = [f"{m.hello.rank}:{pb.SinkState.Name(m.state)}" for m in members]
            version = versions.pop() if len(versions) == 1 else 0
            reply.replicas.add(replica=name, serving=serving, version=version, ranks=states)
        reply.sources.extend(m.label for m in self.sources())

    def overdue(self, version: OpenVersion, min_replicas: int) -> tuple[str, str]:
        """Error class and text for a version whose deadline passed: who was waited for."""
        head = f"version {version.version} was not decided by its deadline: "
        names = {m.id: m.label for m in self.members.values()}
        ranks = version.ranks()
        if version.phase is Phase.OPEN:
            sources = self.sources()
            world = sources[0].hello.world_size if sources else 0
            published = {m.hello.rank for m in sources if m.id in version.published}
            missing = [f"source {r}" for r in range(world) if r not in published]
            if missing:
                return "TransferTimeoutError", f"{head}{', '.join(missing)} did not publish it"
            if self.complete_sides(min_replicas) is None:
                have = {n: len(r) for n, r in self.replicas().items()}
                return (
                    "NoQuorumError",
                    f"{head}{min_replicas} complete replica(s) needed, ranks joined by replica: "
                    f"{have if have else 'none'}",
                )
            return "TransferTimeoutError", f"{head}binding is not finished"
        if version.phase is Phase.ARMING:
            late = ", ".join(names[i] for i in sorted(ranks - version.armed))
            return "TransferTimeoutError", f"{head}{late} made no room; call refit() there"
        late_ids = sorted((version.published - version.written) | (ranks - version.voted))
        late = ", ".join(names.get(i, "a lost member") for i in late_ids)
        return "TransferTimeoutError", f"{head}waiting for {late}"
