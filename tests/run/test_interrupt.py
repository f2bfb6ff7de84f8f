"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sslcells.run import interrupt
from sslcells.run.interrupt import Awaited, Ended, Interrupt, Stopped


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_is_remembered_and_more_do_no_harm(number, status):
    before = signal.getsignal(number)
    with Interrupt() as stopping:
        assert stopping.received == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping.received == number
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


def test_a_second_sigterm_ends_it(monkeypatch):
    monkeypatch.setattr(interrupt, "BURST", 0.05)
    with Interrupt() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, beside the scheduler's
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping.received == signal.SIGTERM
        with pytest.raises(Ended) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended.value.status == 143


HANGS = """
import ctypes, threading, sys
from sslcells.run import interrupt
interrupt.BURST, interrupt.GRACE = 0.2, 0.5
mutex, library = (ctypes.c_char * 64)(), ctypes.CDLL(None)
with interrupt.Interrupt():
    library.pthread_mutex_lock(mutex)
    print("hangs", flush=True)
    library.pthread_mutex_lock(mutex)  # as in a library that waits for another rank: no handler of Python's is called
"""


def test_a_second_sigterm_ends_what_hangs_in_a_library():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert said == "sslcells: ended by a second SIGTERM, without a checkpoint\n"


@pytest.mark.parametrize("before", [True, False])
def test_a_signal_ends_the_waiting(before):
    with Interrupt() as stopping:
        if before:
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(Awaited), stopping.waiting():
            time.sleep(30)
        assert stopping.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGUSR1)  # out of it again
