"""Two jobs on one folder."""

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys

import pytest

from sslcells.config import ConfigError
from sslcells.run import lock
from sslcells.run.lock import FILE, Lock


def owner(folder, **changes):
    """Write the lock of another process."""
    other = {"host": "elsewhere", "process": 1, "started": 0.0, "job": "", "start": "0", "token": "theirs", "beat": 0}
    (folder / FILE).write_text(json.dumps(other | changes))


def taken(folder):
    """The lock, whose file now names this process."""
    mine = Lock(folder)
    assert json.loads((folder / FILE).read_text())["process"] == os.getpid()
    return mine


def test_one_at_a_time(tmp_path):
    first = Lock(tmp_path)
    with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "):
        Lock(tmp_path)
    first.release()
    assert not (tmp_path / FILE).exists()
    Lock(tmp_path).release()


def test_a_dead_process_here_has_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 100)
    code = f"import os, pathlib; from sslcells.run.lock import Lock; Lock(pathlib.Path({str(tmp_path)!r})); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / FILE).exists()
    Lock(tmp_path).release()


def test_another_host_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.4)
    owner(tmp_path)
    Lock(tmp_path).release()  # its beat stood still

    monkeypatch.setattr(lock.time, "sleep", lambda seconds: owner(tmp_path, beat=1, job="7"))
    owner(tmp_path, job="7")
    with pytest.raises(ConfigError, match="in use by job 7, process 1 on elsewhere"):
        Lock(tmp_path)


def test_an_earlier_start_of_the_same_job_has_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 100)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    owner(tmp_path, job="12", start="0")
    taken(tmp_path).release()


def test_a_torn_file_is_nobodys(tmp_path):
    (tmp_path / FILE).write_text('{"host": "els')
    taken(tmp_path).release()


def test_who_loses_the_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    mine = Lock(tmp_path)
    owner(tmp_path, token="other")
    mine._thread.join(10)
    assert mine.lost == "process 1 on elsewhere"
    mine.release()
    assert json.loads((tmp_path / FILE).read_text())["token"] == "other"


def race(folder, rounds, starts, ended, answers):
    """Try to take a folder in each round, together with the other processes; 1 if it was taken and kept."""
    for i in range(rounds):
        path = folder / str(i)
        starts.wait(60)
        try:
            mine = Lock(path)
        except ConfigError as error:
            assert "in use by process" in str(error)  # noqa: PT017
            mine = None
        answers[i] += mine is not None
        ended.wait(60)
        if mine is not None:
            mine.release()


@pytest.mark.parametrize("before", ["nobody", "the dead", "a torn file"])
def test_of_many_that_start_at_once_one_has_the_folder(tmp_path, before):
    """Twenty rounds of six processes."""
    rounds, many, context = 20, 6, multiprocessing.get_context("fork")
    for i in range(rounds):
        (tmp_path / str(i)).mkdir()
        if before == "the dead":
            owner(tmp_path / str(i), host=socket.gethostname(), process=2**22 + 1)
        elif before == "a torn file":
            (tmp_path / str(i) / FILE).write_text('{"host"')
    starts, ended = context.Barrier(many), context.Barrier(many)
    each = [context.Array("i", rounds) for _ in range(many)]
    args = [(tmp_path, rounds, starts, ended, answers) for answers in each]
    processes = [context.Process(target=race, args=a) for a in args]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * many
    assert [sum(answers[i] for answers in each) for i in range(rounds)] == [1] * rounds


def test_a_folder_that_another_host_has_just_taken_is_left_to_it(tmp_path, monkeypatch):
    """Without system locks, another host may take the folder after this one found its owner dead."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    owner(tmp_path, token="dead")

    def meanwhile(self, other):
        if other["token"] == "theirs":
            return True
        owner(tmp_path, token="theirs")
        return False

    monkeypatch.setattr(Lock, "_is_alive", meanwhile)
    with pytest.raises(ConfigError, match="in use by process 1 on elsewhere"):
        Lock(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["token"] == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == [lock.TAKING, FILE]


def test_a_file_system_without_locks_and_links(tmp_path, monkeypatch):
    def none(*args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.FileLock, "acquire", none)
    monkeypatch.setattr(os, "link", none)
    first = Lock(tmp_path)
    with pytest.raises(ConfigError, match="in use by process"):
        Lock(tmp_path)
    first.release()
