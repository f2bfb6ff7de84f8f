"""Two jobs on one folder."""

import json
import os
import subprocess
import sys

import pytest

from sslcells import lock
from sslcells.config import ConfigError
from sslcells.lock import FILE, Lock


def owner(folder, **changes):
    """Write the lock of another process."""
    other = {"host": "elsewhere", "process": 1, "started": 0.0, "job": "", "start": "0", "token": "theirs", "beat": 0}
    (folder / FILE).write_text(json.dumps(other | changes))


def test_one_at_a_time(tmp_path):
    first = Lock(tmp_path)
    with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on "):
        Lock(tmp_path)
    first.release()
    assert not (tmp_path / FILE).exists()
    Lock(tmp_path).release()


def test_a_dead_process_here_has_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 100)
    code = f"import os, pathlib; from sslcells.lock import Lock; Lock(pathlib.Path({str(tmp_path)!r})); os._exit(0)"
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
    Lock(tmp_path).release()


def test_a_torn_file_is_nobodys(tmp_path):
    (tmp_path / FILE).write_text('{"host": "els')
    Lock(tmp_path).release()


def test_who_loses_the_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    mine = Lock(tmp_path)
    owner(tmp_path, token="other")
    mine._thread.join(10)
    assert mine.lost == "process 1 on elsewhere"
    mine.release()
    assert json.loads((tmp_path / FILE).read_text())["token"] == "other"
