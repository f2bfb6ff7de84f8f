"""What is searched: `KEY=RANGE` for any key of the configuration, checked through it before any trial."""

import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from pydantic import BaseModel

from sslcells.config import PLUGINS, ConfigError, Run, load
from sslcells.values import options

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
_COMMA = re.compile(r",(?![^\[{]*[\]}])")
"""A comma outside brackets."""
_OWN = {"name", "out", "resume"}
_CHANGE_NOTHING = {"log", "checkpoint", "compare"}
_FORMS = "expected KEY=LOW..HIGH, KEY=LOW..HIGH:log, or KEY=A,B,C; what stays as it is comes before --search"


class Range(NamedTuple):
    """The values of a key among which a trial chooses: numbers from `low` to `high`, or one of `choices`."""

    key: str
    choices: tuple[str, ...]
    """as typed; empty for numbers"""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    """only whole numbers"""

    @property
    def extremes(self) -> tuple[str, ...]:
        """The values that are checked before any trial: all choices, or both ends."""
        return self.choices or (self.word(self.low), self.word(self.high))

    def word(self, value: Any) -> str:
        """A value as `KEY=` takes it; a number with four digits, where these lie in the range."""
        if self.choices:
            return str(value)
        if self.whole:
            return str(int(value))
        short = float(f"{value:.4g}")
        return repr(short if self.low <= short <= self.high else float(value))

    def __str__(self) -> str:
        if self.choices:
            return f"{self.key}={','.join(self.choices)}"
        return f"{self.key}={self.word(self.low)}..{self.word(self.high)}{':log' if self.log else ''}"


def ranges(words: Sequence[str], config: str | None, overrides: Sequence[str]) -> list[Range]:
    """The ranges that `KEY=RANGE` words say, for the configuration of `config` and `overrides`.

    Raises:
        ConfigError: if a word says no range, a key is unknown, may not be searched, or does not take a value.
    """
    found = [_range(word) for word in words]
    keys, fixed = [one.key for one in found], {override.partition("=")[0] for override in overrides}
    for number, key in enumerate(keys):
        if key in keys[:number] or key in fixed:
            raise ConfigError(f"--search {key}: {'given twice' if key in keys[:number] else 'it is also fixed'}")
    run = first(found, config, overrides)
    found = [one if one.choices else _of_numbers(one, run) for one in found]
    for settings in _extremes(found):
        load(config, [*overrides, *settings])
    return found


def first(found: Sequence[Range], config: str | None, overrides: Sequence[str]) -> Run:
    """The configuration with the first value of each range.

    Raises:
        ConfigError: as `load`.
    """
    return load(config, [*overrides, *(f"{one.key}={one.extremes[0]}" for one in found)])


def _range(word: str) -> Range:
    key, equals, text = word.partition("=")
    if not (equals and all(key.split("."))):
        raise ConfigError(f"--search {word}: {_FORMS}")
    section = key.split(".")[0]
    if key in _OWN or section in _CHANGE_NOTHING:
        why = "each trial has its own" if key in _OWN else "it does not change what is learned"
        raise ConfigError(f"--search {key}: {why}")
    if section == "evaluate":
        raise ConfigError(f"--search {key}: it changes how trials are measured, so that they cannot be compared")
    if numbers := _RANGE.fullmatch(text):
        low, high, log = float(numbers[1]), float(numbers[2]), bool(numbers[3])
        if not low < high or (log and low <= 0):
            raise ConfigError(f"--search {word}: {'expected LOW below HIGH' if low >= high else 'log needs LOW > 0'}")
        whole = all(re.fullmatch(r"[-+]?\d+", end) for end in numbers.groups()[:2])
        return Range(key, (), low, high, log, whole)
    choices = tuple(choice.strip() for choice in _COMMA.split(text))
    if len(choices) < 2 or "" in choices:
        raise ConfigError(f"--search {word}: {_FORMS}")
    if len({*choices}) < len(choices):
        raise ConfigError(f"--search {word}: a value is given twice")
    return Range(key, choices)


def _of_numbers(one: Range, run: Run) -> Range:
    """The range as the type of its field takes it: whole numbers, or any."""
    kinds = _kinds(run, one.key)
    if not kinds or float in kinds:
        return one._replace(whole=one.whole and (not kinds or int in kinds))
    if int not in kinds:
        raise ConfigError(f"--search {one}: {one.key} takes no range of numbers; name its values, {one.key}=A,B")
    if not one.whole:
        raise ConfigError(f"--search {one}: {one.key} takes whole numbers")
    return one


def _kinds(run: Run, key: str) -> set[Any]:
    """The types that a key takes; empty inside a mapping such as `model.args`, which says none."""
    owner: Any = run
    *sections, last = key.split(".")
    for section in sections:
        owner = getattr(owner, section, None)
    field = type(owner).model_fields.get(last) if isinstance(owner, BaseModel) else None
    return set() if field is None else {*options(field.annotation)}


def _extremes(found: Sequence[Range]) -> Iterator[list[str]]:
    """Settings to check: the extremes of each range, the others at their first, with every choice of a plugin."""
    of_plugins = [one for one in found if one.key in {f"{name}.{plugin.key}" for name, plugin in PLUGINS.items()}]
    others = [one for one in found if one not in of_plugins]
    for chosen in product(*(one.extremes for one in of_plugins)):
        plugins = [f"{one.key}={word}" for one, word in zip(of_plugins, chosen, strict=True)]
        firsts = {one.key: one.extremes[0] for one in others}
        yield plugins + [f"{key}={word}" for key, word in firsts.items()]
        for one in others:
            for word in one.extremes[1:]:
                yield plugins + [f"{key}={value}" for key, value in (firsts | {one.key: word}).items()]
