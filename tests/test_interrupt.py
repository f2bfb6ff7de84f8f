"""Signals that ask a run to stop."""

import os
import signal
import threading

import pytest

from sslcells.interrupt import Interrupt, Stopped


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_is_remembered_and_more_do_no_harm(number, status):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.asked == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupt.asked == number
    assert signal.getsignal(number) == before
    assert Stopped(number, "").status == status


def test_a_second_control_c_ends_it():
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_a_thread_nothing_is_caught():
    before, seen = signal.getsignal(signal.SIGUSR1), []

    def work():
        with Interrupt():
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
