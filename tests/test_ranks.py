"""Messages between ranks: votes, errors, and why a rank left. On real gloo ranks."""

import pytest
from gloo import on_ranks

from sslcells import ranks
from sslcells.data import DataError
from sslcells.run.interrupt import Interrupt
from sslcells.train import in_step


def votes():
    return ranks.largest(7 if ranks.rank() == 1 else 3)


def test_the_largest_is_known_to_all():
    assert on_ranks(3, votes) == [7, 7, 7]


def broken():
    """Rank 1 cannot read its third batch; what each rank got, and what it raises."""

    def batches():
        yield from range(2 if ranks.rank() == 1 else 5)
        if ranks.rank() == 1:
            raise DataError("cell_17.png: truncated")

    got = []
    try:
        for batch in in_step(batches(), (), Interrupt()):
            got.append(batch)
    except DataError as error:
        return got, str(error), error.__notes__
    return got, None, None


def test_what_one_rank_cannot_read_every_rank_raises():
    assert on_ranks(3, broken) == [([0, 1], "cell_17.png: truncated", ["rank 1"])] * 3


def unsound():
    def check():
        if ranks.rank() == 2:
            raise ValueError("the folder is gone")

    with pytest.raises(ValueError, match="the folder is gone") as raised:
        list(in_step(iter(range(5)), (check,), Interrupt()))
    return raised.value.__notes__


def test_what_one_rank_finds_wrong_every_rank_raises():
    assert on_ranks(3, unsound) == [["rank 2"]] * 3


def stopped():
    """A signal reaches rank 1 in its second step."""
    interrupt, got = Interrupt(), []
    for batch in in_step(iter(range(5)), (), interrupt):
        got.append(batch)
        if ranks.rank() == 1 and batch == 1:
            interrupt.received = 10
    return got, interrupt.received


def test_all_stop_after_the_same_step():
    assert on_ranks(3, stopped) == [([0, 1], 10)] * 3


def post_mortem(error, *leaving):
    """On one rank: leave in the way that `leaving` gives for it, or return the error about lost ranks."""
    ranks._POST_MORTEM = 1.0
    for number, cause in leaving:
        if ranks.rank() == number:
            if cause:
                ranks.leave(cause)
            ranks.barrier()
            return None
    lost = ranks.lost(error)
    ranks.barrier()
    return str(lost) if lost else None


GONE = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2081")


@pytest.mark.parametrize("error", [GONE, RuntimeError("Application timeout caused pair closure")])
def test_who_vanished_is_named(error):
    _, a, b = on_ranks(3, post_mortem, error, (0, ""))
    assert a == b
    assert a.startswith("rank 0 of 3 disappeared without an error message")


def test_who_left_with_a_reason_is_quoted():
    a, _, b = on_ranks(3, post_mortem, GONE, (1, "KeyError: 'x'"))
    assert a == b == "another rank stopped: rank 1: KeyError: 'x'"


def test_errors_of_other_kinds_are_no_lost_ranks():
    assert on_ranks(2, post_mortem, RuntimeError("shapes do not match")) == [None, None]
    assert ranks.lost(GONE) is None
