"""The settings as tables, from the typed configuration: key, default, what it takes, meaning."""

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sslcells.config import PLUGINS, Run

SIGNS = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}
NUMBERS = {int: "whole number", float: "number"}
SCALARS = {str: "text", bool: "`true`, `false`", Any: "anything"}


class Setting(NamedTuple):
    """One key of the configuration."""

    key: str
    default: str
    takes: str
    meaning: str


def of(section: type[BaseModel], prefix: str) -> Iterator[Setting]:
    """The settings of a section, those of sections inside it too, in the order of the code."""
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            yield from of(inner, f"{prefix}{name}.")
        else:
            default = (
                "must be set" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
            )
            meaning = " ".join((field.description or "").split())
            yield Setting(prefix + name, default, taken(field.annotation, field.metadata), meaning)


def table(section: type[BaseModel], prefix: str, leave_out: Sequence[str] = ()) -> str:
    """The settings of a section as a Markdown table; those whose last word is in `leave_out` are left out."""
    rows = [s for s in of(section, prefix) if s.key.removeprefix(prefix) not in leave_out]
    lines = ["| setting | default | takes | meaning |", "|---|---|---|---|"]
    lines += [f"| `{s.key}` | {_cell(s.default)} | {_cell(s.takes)} | {_cell(linked(s.meaning))} |" for s in rows]
    return "\n".join(lines)


def general() -> str:
    """Every section but those whose settings depend on a choice."""
    scalars = [n for n, f in Run.model_fields.items() if n in PLUGINS or _section(f.annotation)]
    parts = ["## The run", table(_without(Run, scalars), "")]
    for name, field in Run.model_fields.items():
        section = _section(field.annotation)
        if section is not None and name not in PLUGINS:
            parts += [f"## {name}", linked(described(section)), table(section, f"{name}.")]
    return "\n\n".join(parts)


def plugin(name: str) -> str:
    """Every choice of a section such as `data`, with its settings."""
    chosen = PLUGINS[name]
    parts = []
    for choice in chosen.names():
        config = chosen.config(choice)
        head = f"## {choice}" + " (default)" * (choice == chosen.default)
        parts += [head, linked(described(config)), f"`{name}.{chosen.key}={choice}`"]
        parts.append(table(config, f"{name}.", [chosen.key]))
    return "\n\n".join(parts)


def described(thing: Any) -> str:
    """A docstring as one paragraph a paragraph."""
    text = (thing.__doc__ or "").strip()
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def linked(text: str) -> str:
    """Text in which every arXiv number leads to its paper."""
    text = re.sub(r"(?<![\[<])(https?://[^\s,;)]+[^\s,;).:])", r"<\1>", text)
    return re.sub(r"(?<![/\w.])(?:arXiv )?(\d{4}\.\d{4,5})(?![\d.]*\w)", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def shown(value: Any) -> str:
    """A default as it would be typed on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(shown, value)) + "]"
    return str(value) or '""'


def taken(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a field of this type takes, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return taken(inner[0], [*inner[1:], *metadata])
    if origin in (types.UnionType, typing.Union):
        return ", ".join("`none`" if a is type(None) else taken(a, metadata) for a in inner)
    if origin is typing.Literal:
        return ", ".join(f"`{shown(a)}`" for a in inner)
    if origin is tuple:
        kinds = [taken(a) for a in inner if a is not Ellipsis]
        return f"list of {kinds[0]}" if inner[-1] is Ellipsis else f"[{', '.join(kinds)}]"
    if origin is list:
        return f"list of {taken(inner[0])}"
    if origin is dict:
        return "mapping"
    if annotation in NUMBERS:
        return " ".join([NUMBERS[annotation], _bounds(metadata)]).strip()
    if annotation not in SCALARS:
        raise TypeError(f"{annotation} has no words in docs/generate/settings.py")
    return SCALARS[annotation]


def _bounds(metadata: Sequence[Any]) -> str:
    """`≥ 0, < 1` of pydantic's and annotated_types' constraints."""
    found = []
    for constraint in metadata:
        for kind, sign in SIGNS.items():
            if isinstance(constraint, kind):
                found.append(f"{sign} {getattr(constraint, kind.__name__.lower()):g}")
    return ", ".join(found)


def _section(annotation: Any) -> type[BaseModel] | None:
    while typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def _without(section: type[BaseModel], names: Sequence[str]) -> Any:
    """What `of` reads of a section, without some of its fields."""
    fields: dict[str, FieldInfo] = {n: f for n, f in section.model_fields.items() if n not in names}
    return types.SimpleNamespace(model_fields=fields)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
