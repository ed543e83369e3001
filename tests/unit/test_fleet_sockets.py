"""Turns of raw sockets: every byte once, and no sender in two places while others idle."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from weightsync.fleet.sockets import BlastReceiver, BlastSender, turns
from weightsync.units import MIB


@given(
    st.integers(1, 6).flatmap(
        lambda num: st.lists(
            st.lists(st.integers(0, 20 * MIB), min_size=num, max_size=num), min_size=1, max_size=6
        )
    )
)
def test_every_byte_has_one_turn(matrix: list[list[int]]) -> None:
    found = turns(matrix)
    for receiver, own in enumerate(found):
        for sender, row in enumerate(matrix):
            assert sum(nbytes for s, nbytes in own if s == sender) == row[receiver]


def test_an_even_matrix_is_served_without_a_wait() -> None:
    # Twice as many senders as receivers: in every round each receiver has a sender of its own.
    found = turns([[8 * MIB] * 4 for _ in range(8)])
    for at in zip(*found, strict=True):
        assert len({sender for sender, _ in at}) == 4
        assert {nbytes for _, nbytes in at} == {MIB}


def test_bytes_arrive_over_every_rail() -> None:
    rails = ["127.0.0.1", "127.0.0.2"]
    order = turns([[3 * MIB + 1], [MIB]])[0]
    receiver = BlastReceiver(rails, order)
    place = {"addresses": rails, "ports": receiver.ports, "nbytes": 3 * MIB + 1}
    senders = [BlastSender(number, rails, [place]) for number in range(2)]
    threads = [threading.Thread(target=sender.run) for sender in senders]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    assert began <= receiver.run(began) < began + 30
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
