"""Folders of runs, written by hand as training writes them."""

import json
import os
import time

CONFIG = """\
name: {name}
out: runs
seed: 0
method:
  hidden: 256
  name: simclr
train:
  global_batch: 100
  total_epochs: 4.0
  total_steps: {steps}
checkpoint:
  every_steps: 7
log:
  every_steps: 10
"""


def rows(done, every=10, per_epoch=50):
    """Lines of metrics.jsonl: figures of val at step 0 and every 50 steps, a loss every `every` steps."""
    for step in range(0, done + 1, every):
        row = {"step": step, "epoch": round(step / per_epoch, 4)}
        if step:
            yield row | {"loss": 5 - step / 100, "images_per_second": 200.0, "lr": 0.1}
        if step % 50 == 0:
            yield row | {"knn/top1": 0.5 + (step if step < 150 else 100) / 1000, "knn/balanced": 0.4}


def make(folder, done=100, steps="null", finished=False, stopped=None):
    """A run of 4 epochs of 50 steps, unless `steps` says otherwise, of which `done` steps are done."""
    (folder / "plots").mkdir(parents=True)
    (folder / "checkpoints" / f"step_{done:08d}").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, steps=steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(done)))
    if finished:
        (folder / "encoder.json").write_text("{}")
    if stopped:
        (folder / "stopped.txt").write_text(stopped)
    return folder


def age(path, seconds):
    """Make a file as old as that."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def lock(folder, silent=0.0, **owner):
    """The lock of a process, whose last beat was so many seconds ago."""
    other = {"host": "elsewhere", "process": 1, "started": 0.0, "job": "", "start": "0", "token": "t", "beat": 3}
    (folder / "lock.json").write_text(json.dumps(other | owner))
    age(folder / "lock.json", silent)
