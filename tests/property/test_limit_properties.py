"""Limits of random problems against brute force: subsets, linear programs, sets of elements."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from support import scaled
from support.clusters import random_cluster
from support.scenarios import random_scenario
from weightsync.ir import Manifest, Plan
from weightsync.planners import bounds
from weightsync.planners.cluster import Cluster
from weightsync.planners.limits import limits_of
from weightsync.planners.planner import plan_transfer
from weightsync.planners.traffic import bucket_work, traffic_of

seeds = st.integers(0, 2**32 - 1)
Element = tuple[int, tuple[int, ...], int]  # tensor, index, dtype of the sink


def _classes(rng: random.Random) -> tuple[list[int], list[list[int]], list[float]]:
    """Return bytes and holders of random classes, and rates of ports."""
    ports = [rng.choice([1.0, 2.0, rng.uniform(0.1, 5)]) for _ in range(rng.randint(1, 5))]
    holders = [
        sorted(rng.sample(range(len(ports)), rng.randint(1, len(ports))))
        for _ in range(rng.randint(0, 5))
    ]
    return [rng.choice([0, 1, rng.randint(0, 10**12)]) for _ in holders], holders, ports


@settings(max_examples=scaled(60, 3000))
@given(seeds)
def test_what_holders_must_send_is_the_worst_subset_and_the_best_assignment(seed: int) -> None:
    nbytes, holders, rates = _classes(random.Random(seed))
    start = np.cumsum([0, *(len(h) for h in holders)])
    flat = np.array([p for h in holders for p in h], np.int64)
    found = bounds.held_s(np.array(nbytes, np.int64), start, flat, np.array(rates))
    worst = 0.0
    for size in range(1, len(nbytes) + 1):
        for subset in itertools.combinations(range(len(nbytes)), size):
            ports = set().union(*(holders[c] for c in subset))
            worst = max(worst, sum(nbytes[c] for c in subset) / sum(rates[p] for p in ports))
    assert found == pytest.approx(worst, rel=1e-6)
    # Variables: what each holder sends of each class (as a share of the largest), then T.
    unit = max([1, *nbytes])
    edges = [(c, p) for c, h in enumerate(holders) for p in h]
    if not edges:
        return
    equal = [[float(c == k) for k, _ in edges] + [0.0] for c in range(len(nbytes))]
    loads = [[float(p == q) for _, q in edges] + [-rates[p]] for p in range(len(rates))]
    goal = [0.0] * len(edges) + [1.0]
    best = linprog(goal, loads, [0.0] * len(rates), equal, [b / unit for b in nbytes])
    assert found == pytest.approx(best.fun * unit, rel=1e-6, abs=1e-6 * unit)


def _best_relay(total: float, up: list[float], sinks: list[tuple[float, float]]) -> float:
    """Return the least time in which all sinks get the same content, as a linear program.

    Part j of the content goes to sink j alone, which sends it on to all others; part 0 goes from
    the sources to everybody (Kumar and Ross, 2006).
    """
    num = len(sinks)
    goal = [0.0] * (num + 1) + [1.0]
    limits = [[float(num), *([1.0] * num), -sum(up)]]
    for j, (_, egress) in enumerate(sinks):
        limits.append([0.0, *((num - 1.0) * (k == j) for k in range(num)), -egress])
    limits += [[1.0] * (num + 1) + [-ingress] for ingress, _ in sinks]
    best = linprog(goal, limits, [0.0] * len(limits), [[1.0] * (num + 1) + [0.0]], [total])
    return float(best.fun)


@settings(max_examples=scaled(60, 3000))
@given(seeds)
def test_relays_reach_their_bound_and_are_never_slower_than_direct(seed: int) -> None:
    rng = random.Random(seed)
    up = [rng.uniform(0.1, 4) for _ in range(rng.randint(1, 4))]
    down = [rng.uniform(0.1, 4) for _ in range(rng.randint(1, 5))]
    total = rng.randint(1, 1000)
    need = np.full(len(down), total)
    bound = bounds.relay_s(total, need, np.array(up), np.array(down))
    assert bound == pytest.approx(_best_relay(total, up, [(d, d) for d in down]), rel=1e-6)
    direct = max(need.sum() / sum(up), (need / down).max())
    half = bounds.relay_s(total, need, np.array(up), np.array(down), is_full_duplex=False)
    assert bound <= half * (1 + 1e-9)
    assert half <= direct * (1 + 1e-9)
    gain = bounds.relay_gain(need, np.array(up), np.array(down))
    assert gain >= 1
    assert direct <= gain * bound * (1 + 1e-9)


def _elements(manifest: Manifest, piece: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return the tensor's name index and canonical index of each element of a piece."""
    pieces = manifest.pieces
    axes = [
        [lo + step * i for i in range(n)]
        for lo, n, step in zip(
            pieces.lo[piece].tolist(),
            pieces.n[piece].tolist(),
            pieces.step[piece].tolist(),
            strict=True,
        )
    ]
    return [(int(pieces.tensor[piece]), index) for index in itertools.product(*axes)]


def _wanted(plan: Plan) -> list[list[Element]]:
    """Return every element that each sink stores, as often as it stores it."""
    found: list[list[Element]] = [[] for _ in plan.sink.ranks]
    for piece in np.flatnonzero(plan.sink.pieces.tensor >= 0).tolist():
        buffer = int(plan.sink.pieces.buffer[piece])
        dtype = int(plan.sink.buffers.dtype[buffer])
        rank = int(plan.sink.buffers.rank[buffer])
        found[rank] += [(t, index, dtype) for t, index in _elements(plan.sink, piece)]
    return found


def _holders(plan: Plan) -> dict[tuple[int, tuple[int, ...]], set[int]]:
    """Return who holds each element, by the sink's number of the tensor."""
    number = {int(s): t for t, s in enumerate(plan.tensor_in_source) if s >= 0}
    found: dict[tuple[int, tuple[int, ...]], set[int]] = defaultdict(set)
    for piece in np.flatnonzero(plan.source.pieces.tensor >= 0).tolist():
        rank = int(plan.source.buffers.rank[plan.source.pieces.buffer[piece]])
        for tensor, index in _elements(plan.source, piece):
            if tensor in number:
                found[(number[tensor], index)].add(rank)
    return found


def _nbytes(elements: list[Element] | set[Element]) -> int:
    sizes = {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4}
    return sum(sizes.get(dtype, 8) for _, _, dtype in elements)


def _plan(seed: int) -> Plan:
    scenario = random_scenario(random.Random(seed))
    return plan_transfer(*scenario.manifests(), scenario.options)


@settings(max_examples=scaled(60, 2000))
@given(seeds, st.integers(1, 3))
def test_traffic_counts_what_elements_count(seed: int, gpus_per_node: int) -> None:
    plan = _plan(seed)
    traffic = traffic_of(plan, gpus_per_node)
    wanted, holders = _wanted(plan), _holders(plan)
    nodes = [
        set().union(*(set(w) for w in wanted[first : first + gpus_per_node]))
        for first in range(0, len(wanted), gpus_per_node)
    ]
    assert traffic.need_bytes.tolist() == [_nbytes(w) for w in wanted]
    assert traffic.distinct_bytes.tolist() == [_nbytes(set(w)) for w in wanted]
    assert traffic.node_bytes.tolist() == [_nbytes(node) for node in nodes]
    assert traffic.unique_bytes == _nbytes(set().union(*nodes))
    classes: dict[tuple[int, ...], list[list[Element]]] = defaultdict(lambda: [[], [], []])
    places = [
        [e for w in wanted for e in w],
        [e for node in nodes for e in node],
        list(set().union(*nodes)),
    ]
    for which, elements in enumerate(places):
        for element in elements:
            classes[tuple(sorted(holders[element[:2]]))][which].append(element)
    expected = {h: [_nbytes(e) for e in found] for h, found in classes.items()}
    columns = (traffic.class_copy_bytes, traffic.class_node_bytes, traffic.class_bytes)
    got = {}
    for number, counts in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        ranks = traffic.holder[traffic.holder_start[number] : traffic.holder_start[number + 1]]
        if any(counts):
            got[tuple(ranks.tolist())] = list(counts)
    assert got == expected


@settings(max_examples=scaled(60, 2000))
@given(seeds)
def test_the_work_of_buckets_is_that_of_their_rows(seed: int) -> None:
    plan = _plan(seed)
    work = bucket_work(plan)
    rows, chunks, buckets = plan.rows, plan.chunks, plan.buckets
    for bucket in range(len(buckets)):
        read = pack = digest = 0
        span = range(int(buckets.chunk_lo[bucket]), int(buckets.chunk_hi[bucket]))
        for chunk in span:
            mine = range(int(chunks.row_lo[chunk]), int(chunks.row_hi[chunk]))
            size = sum(
                math.prod(plan.nests.n[rows.nest[r]].tolist())
                * int(plan.source.buffers.itemsize[rows.src_buffer[r]])
                for r in mine
            )
            read += size
            if chunks.is_packed[chunk]:
                pack += size + int(chunks.nbytes[chunk])
            else:
                digest += int(chunks.nbytes[chunk])
        assert work.read_bytes[bucket] == read
        assert work.pack_bytes[bucket] == pack
        assert work.digest_bytes[bucket] == digest
        assert work.num_writes[bucket] == len(span)
    assert not work.is_hop.any()
    traffic = traffic_of(plan, 2, work)
    assert traffic.source_bytes.tolist() == plan.bytes_per_source().tolist()
    assert traffic.pair_bytes.sum(axis=0).tolist() == plan.bytes_per_sink().tolist()
    assert traffic.source_writes.sum() == traffic.sink_writes.sum() == len(chunks)


def _per_group(values: list[int], size: int) -> list[int]:
    return [sum(values[first : first + size]) for first in range(0, len(values), size)]


def _expected_limits(
    plan: Plan, cluster: Cluster, quality: str, offloaded: bool
) -> dict[str, float]:
    """Recompute the limits that need no flow, from elements and rows, in plain Python."""
    gpus, nics = cluster.gpus_per_node, cluster.nics_per_node
    sharing = gpus // min(gpus, nics)

    def rate(value: object) -> float:
        return float(getattr(value, quality)) * 1e9

    port = rate(cluster.nic_gbit_per_s) / 8 * max(nics // gpus, 1)
    port *= cluster.ecmp_fraction if quality == "attainable" else 1
    wanted = _wanted(plan)
    need = [_nbytes(w) for w in wanted]
    # Ports of a node: ranks of the node in groups of those that share a NIC.
    in_ports, dedup, passed = [0], [0.0], [0.0]
    for first in range(0, len(wanted), gpus):
        members = wanted[first : first + gpus]
        ports = _per_group([_nbytes(w) for w in members], sharing)
        in_ports += ports
        union = _nbytes(set().union(*(set(w) for w in members)))
        dedup.append(union / len(ports))
        passed.append((sum(_nbytes(set(w)) for w in members) - union) / len(members))
    work = bucket_work(plan)
    sources = range(len(plan.source.ranks))

    def of_source(values: np.ndarray) -> list[int]:
        return [int(values[plan.buckets.src_rank == s].sum()) for s in sources]

    sent, read = of_source(plan.buckets.nbytes), of_source(work.read_bytes)
    if cluster.is_gpu_direct:
        pcie = host = read if offloaded else [0]
        host_sinks = [0]
    else:
        pcie, host = [0] if offloaded else sent, sent
        host_sinks = need
    cut = cluster.cut_gbit_per_s
    gap = max(
        cluster.write_overhead_s / cluster.posting_threads,
        cluster.message_gap_s / max(nics // gpus, 1),
    )
    return {
        "receiver_s": max(in_ports) / port,
        "receiver_dedup_s": max(dedup) / port,
        "unique_s": _nbytes(set().union(*map(set, wanted))) / (len(in_ports) - 1) / port,
        "cut_s": sum(need) * 8 / rate(cut) if cut else 0.0,
        "h2d_s": max(pcie) / rate(cluster.h2d_gb_per_s),
        "host_memory_s": max(_per_group(host, gpus) + _per_group(host_sinks, gpus))
        / rate(cluster.host_memory_gb_per_s),
        "nvlink_s": max(passed) / rate(cluster.nvlink_gb_per_s),
        "encode_s": max(of_source(work.pack_bytes)) / rate(cluster.encode_gb_per_s),
        "digest_s": max(of_source(work.digest_bytes) + need) / rate(cluster.digest_gb_per_s),
        "message_s": max(of_source(work.num_writes)) * gap,
    }


@settings(max_examples=scaled(60, 2000))
@given(seeds, st.sampled_from(["nominal", "attainable"]), st.booleans())
def test_limits_of_a_plan_are_those_of_its_elements(
    seed: int, quality: str, offloaded: bool
) -> None:
    plan, cluster = _plan(seed), random_cluster(random.Random(seed))
    traffic = traffic_of(plan, cluster.gpus_per_node)
    found = limits_of(traffic, cluster, quality, is_offloaded=offloaded)  # type: ignore[arg-type]
    expected = _expected_limits(plan, cluster, quality, offloaded)
    by_name = found.by_name()
    assert {name: by_name[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert found.strategy == "direct"
    # Copies of everything leave at least as slowly as everything once.
    assert found.source_s <= found.sender_s * (1 + 1e-6)
    average = plan.buckets.nbytes.sum() / cluster.port_bytes_per_s(quality)  # type: ignore[arg-type]
    assert found.sender_s >= average / (int(cluster.port_of(len(plan.source.ranks)).max()) + 1) * (
        1 - 1e-6
    )
    counted = set(by_name) - {"receiver_dedup_s", "nvlink_s", "unique_s"}
    assert found.unique_s <= found.receiver_dedup_s * (1 + 1e-9)
    assert found.physical_limit_s == max(by_name[name] for name in counted)
    assert by_name[found.limiting + "_s"] == found.physical_limit_s
