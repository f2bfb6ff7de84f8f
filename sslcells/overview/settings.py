"""The few settings of a run that a glance needs, from its config.yaml; reading all of a thousand would take seconds."""

import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from sslcells.overview.figures import Figures


@dataclass(frozen=True)
class Settings:
    """Settings of a run; None for what is not set."""

    method: str = ""
    total_epochs: float | None = None
    total_steps: int | None = None
    global_batch: int | None = None
    every_steps: int | None = None
    """steps between two lines of metrics.jsonl"""

    def steps(self, done: Figures) -> int | None:
        """Steps of the whole training; those of an epoch are known from the newest line, whose epoch is rounded."""
        if self.total_steps or not self.total_epochs or done.epoch <= 0:
            return self.total_steps
        return max(1, round(self.total_epochs * round(done.step / done.epoch)))

    def left(self, done: Figures) -> float | None:
        """Seconds that the rest of the training takes at its present speed, without evaluations."""
        steps = self.steps(done)
        if steps is None or not self.global_batch or not done.speed:
            return None
        return max(0, steps - done.step) * self.global_batch / done.speed

    def pause(self, done: Figures) -> float:
        """Seconds between two lines of metrics.jsonl; 0 if unknown."""
        if not (self.every_steps and self.global_batch and done.speed):
            return 0.0
        return self.every_steps * self.global_batch / done.speed


_KEYS = {"train": ("total_epochs", "total_steps", "global_batch"), "log": ("every_steps",), "method": ("name",)}
_LINE = re.compile(rb"^(?:(\w+):|  (\w+): ([\w.+-]+))\r?$", re.MULTILINE)
"""A section, or a key in one with a plain value, as every run writes them."""


def settings(content: bytes) -> Settings:
    """The settings in the bytes of a config.yaml.

    Raises:
        ValueError: if it is no YAML, or not a run's.
    """
    found: dict[str, Any] = {}
    section = ""
    for top, key, value in _LINE.findall(content):
        section = top.decode() or section
        if key and key.decode() in _KEYS.get(section, ()):
            found[f"{section}.{key.decode()}"] = value.decode()
    if len(found) < sum(map(len, _KEYS.values())):  # changed by hand, or cut off
        found = _whole(content)
    total_epochs, total_steps, batch, every = (
        _number(key, found.get(key))
        for key in ("train.total_epochs", "train.total_steps", "train.global_batch", "log.every_steps")
    )
    return Settings(str(found["method.name"]), total_epochs, _int(total_steps), _int(batch), _int(every))


def _whole(content: bytes) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(content)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"it is no YAML{line}") from None
    except (yaml.YAMLError, RecursionError):
        raise ValueError("it is no YAML") from None
    found: dict[str, Any] = {}
    for section, keys in _KEYS.items():
        below = tree.get(section) if isinstance(tree, dict) else None
        if not isinstance(below, dict) or keys[-1] not in below:
            raise ValueError(f"it has no {section}.{keys[-1]}: cut off, or not a run's")
        found |= {f"{section}.{key}": below.get(key) for key in keys}
    return found


def _number(key: str, value: Any) -> float | None:
    if value in (None, "null"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number <= 0:
        raise ValueError(f"{key}={value!r} is no number above 0")
    return number


def _int(number: float | None) -> int | None:
    return None if number is None else int(number)
