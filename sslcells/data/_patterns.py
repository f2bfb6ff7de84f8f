"""Patterns for paths, which say which images of a folder are read."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sslcells.config import ConfigError
from sslcells.data._names import composed, some

_LIST = re.compile(r"\[[^\[\]]*(?:\[[^\]]*\][^\[\]]*)*\]")
_SHOWN = 3  # paths in one message


def checked(value: Any) -> Any:
    """Patterns as a tuple: one, or several in brackets as typed on a command line; YAML reads no `[*.tif, *.png]`.

    Raises:
        ValueError: for a pattern that can match no path below a folder.
    """
    if isinstance(value, str):
        inside = value[1:-1].split(",") if _LIST.fullmatch(value) else [value]
        value = [] if value in ("", "none", "[]") else [word.strip().strip("'\"") for word in inside]
    if not isinstance(value, (list, tuple)):
        raise ValueError("should be a pattern, or several in brackets")
    patterns = tuple(map(str, value))
    for pattern in patterns:
        parts = pattern.split("/")
        if not pattern.strip("/") or pattern.startswith("/") or ".." in parts or "\\" in pattern:
            raise ValueError(f"{pattern!r} should be relative to the folder, with forward slashes, as train/good is")
    return patterns


class Patterns:
    """Which paths are taken: those that an `include` pattern matches, if there are any, and no `exclude` pattern.

    `*` and `?` stand for characters other than /, [ab] for one of several, ** for any number of folders. A pattern
    without / may match the name of the file or of any folder on its path; one with / starts at the root. What matches a
    folder matches all below it. Letter case counts.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self.include, self.exclude = tuple(include), tuple(exclude)

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def leaves_out(self, path: str) -> str | None:
        """Why an image with this path is left out, for a person; None if it is taken."""
        spelt = composed(path)
        for pattern, regex in self._excluding:
            if regex.fullmatch(spelt):
                return f"excluded by {pattern}"
        if self._including and not any(regex.fullmatch(spelt) for _, regex in self._including):
            return f"not included by {some(self.include, _SHOWN)}"
        return None

    def matched(self, paths: Iterable[str]) -> Counter[str]:
        """How many of the paths each pattern matches."""
        found = Counter[str](dict.fromkeys((*self.include, *self.exclude), 0))
        for path in map(composed, paths):
            found.update(p for p, regex in (*self._including, *self._excluding) if regex.fullmatch(path))
        return found

    def check_used(self, paths: Iterable[str], root: Path, names: tuple[str, str]) -> None:
        """Raise a ConfigError if a pattern matches no image: it would be misspelt. `names` are the two settings'."""
        found, seen = Counter[str](), list[str]()
        wanted = {*self.include, *self.exclude}
        for path in paths:
            seen += [path] * (len(seen) < _SHOWN)
            found.update(self.matched([path]))
            if all(found[pattern] for pattern in wanted):
                return
        for name, patterns in zip(names, (self.include, self.exclude), strict=True):
            for pattern in patterns:
                if not found[pattern]:
                    raise ConfigError(f"{name}={pattern!r} matches no image below {root}, such as {some(seen)}")

    @cached_property
    def _including(self) -> list[tuple[str, re.Pattern[str]]]:
        return [(pattern, _regex(pattern)) for pattern in self.include]

    @cached_property
    def _excluding(self) -> list[tuple[str, re.Pattern[str]]]:
        return [(pattern, _regex(pattern)) for pattern in self.exclude]


def given(include: Sequence[str], exclude: Sequence[str]) -> Patterns:
    """The patterns of a command's --include and --exclude.

    Raises:
        ConfigError: for one that can match no path.
    """
    both = []
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        try:
            both.append(checked(list(patterns)))
        except ValueError as error:
            raise ConfigError(f"{option} {error}") from None
    return Patterns(*both)


def _regex(pattern: str) -> re.Pattern[str]:
    """The regular expression of whole paths that the pattern matches."""
    rooted = "/" in pattern.rstrip("/")
    parts = [part for part in composed(pattern).split("/") if part not in ("", ".")]
    text = "" if rooted else "(?:[^/]+/)*"
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            text += ".+" if last else "(?:[^/]+/)*"
        else:
            text += "".join(map(_piece, re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL))) + "/" * (not last)
    return re.compile(f"{text}(?:/.*)?", re.DOTALL)


def _piece(piece: str) -> str:
    """A star, a question mark, a class in brackets, or one letter, as a regular expression."""
    if piece in ("*", "?"):
        return "[^/]" + "*" * (piece == "*")
    if len(piece) < 3:
        return re.escape(piece)
    inside = piece[1:-1].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
    return f"[^/{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
