"""A connection's end tells of a death; strangers and goodbyes tell of nothing."""

import socket
import time

import pytest

from lora_diffusion_jax.processes.lifelines import Lifelines


@pytest.fixture
def pair():
    """Process 0's ends, and a maker of the others'."""
    where = []
    leader = Lifelines(0, 3, "127.0.0.1", where.append, lambda: "")
    return leader, lambda index: Lifelines(index, 3, "127.0.0.1", where.append, lambda: where[0])


def heard(lines):
    """What `lost` gives once the network has had time to carry it."""
    time.sleep(0.1)
    return lines.lost()


def close(lines):
    for line in lines.lines.values():
        line.close()


def test_a_death_is_told_to_both_sides(pair):
    leader, join = pair
    first, second = join(1), join(2)
    assert heard(leader) == []
    assert sorted(leader.lines) == [1, 2]
    close(second)
    assert heard(leader) == [2]
    assert heard(leader) == []  # once
    close(leader)
    assert heard(first) == [0]


def test_a_goodbye_is_no_death(pair):
    leader, join = pair
    first, second = join(1), join(2)
    assert heard(leader) == []
    first.say_goodbye()
    assert heard(leader) == []
    leader.say_goodbye()
    assert heard(second) == []


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.0\r\n\r\n" * 2, bytes(16) + b"\0\0\0\1"])
def test_strangers_mean_nothing(pair, sent):
    leader, join = pair
    first = join(1)
    with socket.create_connection(leader.server.getsockname()[:2]) as stranger:
        stranger.sendall(sent)
        stranger.shutdown(socket.SHUT_WR)
        assert heard(leader) == []
    assert heard(leader) == []
    close(first)
    assert heard(leader) == [1]
