"""A program: RDMA writes with an immediate between all pairs of RDMA devices, by libibverbs alone.

    python verbs_writes.py [NUM_BYTES]

Prints one line for each ordered pair: `rxe0 rxe1 ok MILLISECONDS`, the time from the post until the
write is acknowledged. Status 0 if every byte and every immediate arrived. Needs no package beside
the standard library, so that it starts quickly in a slow guest, and no headers: the structures are
those of libibverbs' stable binary interface on 64-bit machines.
"""

from __future__ import annotations

import ctypes
import itertools
import socket
import sys
import time
from ctypes import c_char_p, c_int, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final

LIMIT_S: Final = 60.0
RC: Final = 2
INIT, RTR, RTS = 1, 2, 3
INIT_MASK: Final = 57  # state, pkey index, port, access flags
RTR_MASK: Final = 1216897  # state, address, MTU, peer, its PSN, responder depth, RNR timer
RTS_MASK: Final = 77313  # state, timeout, retries, own PSN, initiator depth
LOCAL_WRITE, REMOTE_WRITE = 1, 2
WRITE_WITH_IMM: Final = 1
SIGNALED: Final = 2
RECEIVED_IMM: Final = 129
MTU_1024: Final = 3
POLL_CQ, POST_SEND, POST_RECV = 88, 200, 208  # offsets of function pointers in ibv_context.ops
OPS: Final = 8  # offset of ops in ibv_context


class Cap(ctypes.Structure):
    _fields_ = [
        (name, c_uint32) for name in ("send_wr", "recv_wr", "send_sge", "recv_sge", "inline")
    ]


class QpInit(ctypes.Structure):
    _fields_ = [
        ("context", c_void_p), ("send_cq", c_void_p), ("recv_cq", c_void_p), ("srq", c_void_p),
        ("cap", Cap), ("type", c_int), ("all_signaled", c_int),
    ]  # fmt: skip


class Address(ctypes.Structure):
    _fields_ = [
        ("dgid", c_uint8 * 16), ("flow_label", c_uint32), ("sgid_index", c_uint8),
        ("hop_limit", c_uint8), ("traffic_class", c_uint8), ("_grh_end", c_uint8),
        ("dlid", c_uint16), ("sl", c_uint8), ("src_path_bits", c_uint8),
        ("static_rate", c_uint8), ("is_global", c_uint8), ("port", c_uint8), ("_end", c_uint8),
    ]  # fmt: skip


class QpAttr(ctypes.Structure):
    _fields_ = [
        ("state", c_int), ("current", c_int), ("mtu", c_int), ("mig", c_int),
        ("qkey", c_uint32), ("rq_psn", c_uint32), ("sq_psn", c_uint32), ("peer", c_uint32),
        ("access", c_uint32), ("cap", Cap), ("address", Address), ("alternate", Address),
        ("pkey_index", c_uint16), ("alternate_pkey", c_uint16), ("sqd_event", c_uint8),
        ("draining", c_uint8), ("initiator_depth", c_uint8), ("responder_depth", c_uint8),
        ("rnr_timer", c_uint8), ("port", c_uint8), ("timeout", c_uint8), ("retries", c_uint8),
        ("rnr_retries", c_uint8), ("_end", c_uint8 * 7), ("_rate_limit", c_uint32),
    ]  # fmt: skip


class Segment(ctypes.Structure):
    _fields_ = [("address", c_uint64), ("length", c_uint32), ("lkey", c_uint32)]


class Send(ctypes.Structure):
    _fields_ = [
        ("id", c_uint64), ("next", c_void_p), ("segments", c_void_p), ("num_segments", c_int),
        ("opcode", c_int), ("flags", c_uint32), ("imm", c_uint32), ("remote", c_uint64),
        ("rkey", c_uint32), ("_rest", c_uint8 * 76),
    ]  # fmt: skip


class Receive(ctypes.Structure):
    _fields_ = [
        ("id", c_uint64), ("next", c_void_p), ("segments", c_void_p), ("num_segments", c_int),
    ]  # fmt: skip


class Completion(ctypes.Structure):
    _fields_ = [
        ("id", c_uint64), ("status", c_int), ("opcode", c_int), ("vendor", c_uint32),
        ("num_bytes", c_uint32), ("imm", c_uint32), ("qp", c_uint32), ("source_qp", c_uint32),
        ("flags", c_uint32), ("_rest", c_uint8 * 8),
    ]  # fmt: skip


SIZES: Final = {
    QpInit: 64,
    Address: 32,
    QpAttr: 144,
    Segment: 16,
    Send: 128,
    Receive: 32,
    Completion: 48,
}


def load() -> Any:
    """libibverbs, with the types of what is called."""
    lib = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    p, i = c_void_p, c_int
    for name, result, arguments in [
        ("get_device_list", ctypes.POINTER(p), [ctypes.POINTER(i)]),
        ("get_device_name", c_char_p, [p]),
        ("open_device", p, [p]),
        ("alloc_pd", p, [p]),
        ("create_cq", p, [p, i, p, p, i]),
        ("create_qp", p, [p, p]),
        ("modify_qp", i, [p, p, i]),
        ("reg_mr", p, [p, p, ctypes.c_size_t, i]),
        ("query_gid", i, [p, c_uint8, i, p]),
    ]:
        function = getattr(lib, "ibv_" + name)
        function.restype, function.argtypes = result, arguments
    return lib


lib = load()


def must(result: Any, what: str) -> Any:
    """The pointer, or an error that says what failed."""
    if not result:
        raise OSError(ctypes.get_errno(), f"{what} failed")
    return result


def gid_index(device: str) -> int:
    """The index of RoCEv2 over IPv4."""
    port = Path("/sys/class/infiniband", device, "ports/1")
    for path in sorted((port / "gid_attrs/types").iterdir(), key=lambda path: int(path.name)):
        try:
            kind, gid = path.read_text(), (port / "gids" / path.name).read_text()
        except OSError:  # an empty place of the table
            continue
        if "v2" in kind and gid.startswith("0000:0000:0000:0000:0000:ffff:"):
            return int(path.name)
    raise LookupError(f"{device} has no GID of RoCEv2 over IPv4")


class Device:
    """An open device."""

    def __init__(self, device: int) -> None:
        self.name = lib.ibv_get_device_name(device).decode()
        self.context = must(lib.ibv_open_device(device), f"open {self.name}")
        self.pd = must(lib.ibv_alloc_pd(self.context), "alloc_pd")
        self.gid_index = gid_index(self.name)
        self.gid = (c_uint8 * 16)()
        must(lib.ibv_query_gid(self.context, 1, self.gid_index, self.gid) == 0, "query_gid")

    def call(self, offset: int, *types: Any) -> Any:
        """A function of the provider, which the headers' inline functions would call."""
        pointer = c_void_p.from_address(self.context + OPS + offset).value
        return ctypes.CFUNCTYPE(c_int, *types)(must(pointer, "function"))


class End:
    """One end of a connection, with memory of its own."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.device = device
        self.cq = must(lib.ibv_create_cq(device.context, 16, None, None, 0), "create_cq")
        init = QpInit(send_cq=self.cq, recv_cq=self.cq, cap=Cap(8, 8, 1, 1, 0), type=RC)
        self.qp = must(lib.ibv_create_qp(device.pd, ctypes.byref(init)), "create_qp")
        self.number = c_uint32.from_address(self.qp + 52).value
        self.memory = ctypes.create_string_buffer(num_bytes)
        access = LOCAL_WRITE | REMOTE_WRITE
        mr = lib.ibv_reg_mr(device.pd, self.memory, num_bytes, access)
        self.lkey = c_uint32.from_address(must(mr, "reg_mr") + 36).value
        self.rkey = c_uint32.from_address(mr + 40).value
        self.change(INIT_MASK, state=INIT, port=1, access=REMOTE_WRITE)

    def change(self, mask: int, **attributes: Any) -> None:
        attr = QpAttr(**attributes)
        must(lib.ibv_modify_qp(self.qp, ctypes.byref(attr), mask) == 0, f"modify_qp {mask}")

    def connect(self, peer: End) -> None:
        address = Address(
            dgid=peer.device.gid, sgid_index=self.device.gid_index, hop_limit=8, is_global=1, port=1
        )
        self.change(
            RTR_MASK, state=RTR, address=address, mtu=MTU_1024, peer=peer.number, rq_psn=7,
            responder_depth=1, rnr_timer=12,
        )  # fmt: skip
        self.change(
            RTS_MASK, state=RTS, timeout=14, retries=7, rnr_retries=7, sq_psn=7, initiator_depth=1
        )

    def receive(self) -> None:
        bad = c_void_p()
        request = Receive()
        post = self.device.call(POST_RECV, c_void_p, c_void_p, c_void_p)
        must(post(self.qp, ctypes.byref(request), ctypes.byref(bad)) == 0, "post_recv")

    def write(self, peer: End, imm: int) -> None:
        here = Segment(ctypes.addressof(self.memory), len(self.memory), self.lkey)
        request = Send(
            segments=ctypes.addressof(here), num_segments=1, opcode=WRITE_WITH_IMM, flags=SIGNALED,
            imm=socket.htonl(imm), remote=ctypes.addressof(peer.memory), rkey=peer.rkey,
        )  # fmt: skip
        bad = c_void_p()
        post = self.device.call(POST_SEND, c_void_p, c_void_p, c_void_p)
        must(post(self.qp, ctypes.byref(request), ctypes.byref(bad)) == 0, "post_send")

    def wait(self) -> Completion:
        poll = self.device.call(POLL_CQ, c_void_p, c_int, c_void_p)
        found = Completion()
        deadline = time.monotonic() + LIMIT_S
        while poll(self.cq, 1, ctypes.byref(found)) == 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing completed within {LIMIT_S:g} s")
            time.sleep(0)  # one CPU may be all there is
        if found.status:
            raise OSError(f"completed with status {found.status}")
        return found


def write_between(source: Device, sink: Device, num_bytes: int) -> float:
    """One write; returns the milliseconds until it was acknowledged."""
    here, there = End(source, num_bytes), End(sink, num_bytes)
    here.connect(there)
    there.connect(here)
    here.memory.raw = bytes(i % 251 for i in range(num_bytes))
    imm = 0xABC00000 + num_bytes
    there.receive()
    start = time.monotonic()
    here.write(there, imm)
    here.wait()
    took_ms = (time.monotonic() - start) * 1000
    arrived = there.wait()
    if (arrived.opcode, socket.ntohl(arrived.imm)) != (RECEIVED_IMM, imm):
        raise ValueError(f"opcode {arrived.opcode}, immediate {socket.ntohl(arrived.imm):x}")
    if there.memory.raw != here.memory.raw:
        raise ValueError("the bytes differ")
    return took_ms


def main() -> None:
    """All pairs, each device with itself too."""
    for structure, size in SIZES.items():
        if ctypes.sizeof(structure) != size:
            raise TypeError(
                f"{structure.__name__} has {ctypes.sizeof(structure)} bytes, not {size}"
            )
    num_bytes = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    num = c_int()
    listed = must(lib.ibv_get_device_list(ctypes.byref(num)), "get_device_list")
    devices = [Device(listed[k]) for k in range(num.value)]
    for source, sink in itertools.product(devices, devices):
        took_ms = write_between(source, sink, num_bytes)
        sys.stdout.write(f"{source.name} {sink.name} ok {took_ms:.1f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
