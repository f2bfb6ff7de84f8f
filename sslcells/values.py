"""Values from YAML files and the command line, which keep their text until the type of their field is known.

YAML reads 2024_01 as a number and `no` as false, but a string field needs the text. So every unquoted word of a file,
and every value on the command line, is kept as a Word until `fitted` gets the type of its field.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

NONE = "none"
"""The word for an empty value, in fields that allow one."""


def place(path: str | os.PathLike[str]) -> Path:
    """The path with ~ replaced by the home folder; ~ stays if there is no such user."""
    return Path(os.path.expanduser(path))


class Word:
    """The text as typed, and the value that YAML reads from it, or the text again if YAML cannot read it."""

    __slots__ = ("text", "typed", "value")

    def __init__(self, text: str, value: Any, typed: bool = False) -> None:
        self.text, self.value = text, value
        self.typed = typed
        """True if it comes from the command line, where quotes, brackets and blanks belong to the text"""

    def __str__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e3 is a number, 010 is ten, 1:30 is not a number, and 2024-01-02 is not a date."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` or another YAML reader would read as something else."""


_INT = re.compile(r"[-+]?(?:0b[01_]*[01]|0o[0-7_]*[0-7]|0x[0-9a-fA-F_]*[0-9a-fA-F]|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
_BASES = {"0b": 2, "0o": 8, "0x": 16}


def _integer(loader: yaml.SafeLoader, node: ScalarNode) -> int:
    text = node.value.replace("_", "").lower()
    sign, digits = (-1 if text.startswith("-") else 1), text.lstrip("+-")
    return sign * (int(digits[2:], _BASES[digits[:2]]) if digits[:2] in _BASES else int(digits))


_TAG = "tag:yaml.org,2002:"
_OWN = {_TAG + kind for kind in ("int", "float", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: kept
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, regexp) for tag, regexp in resolvers if tag not in _OWN])
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
    _class.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor(_TAG + "int", _integer)


def read(text: str) -> Any:
    """Read a YAML document into dicts (keys as text), lists, strings (if quoted) and Words.

    Raises:
        ValueError: if it is not valid YAML; the message says where.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _made(loader, node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def typed(text: str) -> Word:
    """Read a value from the command line."""
    try:
        value = read(text)
    except ValueError:
        return Word(text, text, typed=True)
    return Word(text, value.value if isinstance(value, Word) else value, typed=True)


def _made(loader: _Loader, node: Node, within: tuple[Node, ...] = ()) -> Any:
    if node in within:
        raise ConstructorError(None, None, "it contains itself", node.start_mark)
    within = (*within, node)
    if isinstance(node, MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, ScalarNode) and key.tag != _TAG + "merge"]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ConstructorError(None, None, f"found the key {min(twice)} twice", node.start_mark)
        loader.flatten_mapping(node)
        return {_key(key): _made(loader, value, within) for key, value in node.value}
    if isinstance(node, SequenceNode):
        return [_made(loader, item, within) for item in node.value]
    value = loader.construct_object(node)
    plain = isinstance(node, ScalarNode) and node.style is None
    return Word(node.value, value) if plain else value


def _key(node: Node) -> str:
    if not isinstance(node, ScalarNode):
        raise ConstructorError(None, None, "found a key that is not a word", node.start_mark)
    return str(node.value)


def write(tree: Mapping[str, Any]) -> str:
    """YAML that `read` and `interpolated` turn back into the same tree."""
    return yaml.dump(_escaped(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


class Quoted(str):
    """A string that is always written in quotes."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    style = '"' if set(text) & _BREAKS else "'" if isinstance(text, Quoted) else None
    return dumper.represent_scalar(_TAG + "str", str.__str__(text), style=style)


_BREAKS = set("\x85\u2028\u2029\ufeff")
"""Characters that survive only in double quotes."""
for _strings_of in (str, Quoted):
    _Dumper.add_representer(_strings_of, _quoted)


def _escaped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # OmegaConf's escape: this is not an interpolation
    return value


def interpolated(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace ${oc.env:NAME} and ${section.key} in values from files; values from the command line stay as typed.

    Raises:
        ValueError: if there is no such variable or key.
    """
    if not any("${" in text for text in _strings(tree)):
        return tree
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(_opened(tree), flags={"allow_objects": True})
        made = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    assert isinstance(made, dict)
    return {str(key): value for key, value in made.items()}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, Word) and not value.typed:
        yield value.text


def _opened(value: Any) -> Any:
    """The tree, with each Word that contains an interpolation replaced by its text."""
    if isinstance(value, dict):
        return {key: _opened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_opened(item) for item in value]
    return value.text if isinstance(value, Word) and not value.typed and "${" in value.text else value


def plain(value: Any) -> Any:
    """The value as YAML reads it, without Words."""
    if isinstance(value, Word):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def unread(value: Any) -> Any:
    """Like `plain`, but keeps the text if the value would lose part of it (010, 1e3): for fields not known yet."""
    if isinstance(value, Word):
        if isinstance(value.value, int | float):
            return value.value if str(value.value) in (value.text, value.text.capitalize()) else value.text
        return unread(value.value)
    if isinstance(value, dict):
        return {key: unread(item) for key, item in value.items()}
    return [unread(item) for item in value] if isinstance(value, list) else value


def fitted(value: Any, kind: Any) -> Any:
    """The value for a field of type `kind`: the text for a string, the value that YAML reads for other types.

    `none` empties a field that may be empty. A value that does not fit is returned unchanged, for pydantic to refuse.
    """
    kinds = list(options(kind))
    if isinstance(value, Word):
        return _fitted_word(value, kinds, kind)
    if isinstance(value, list):
        items = next((get_args(k)[:1] for k in kinds if get_origin(k) in (tuple, list)), ())
        return [fitted(item, items[0]) if items else plain(item) for item in value]
    if isinstance(value, str) and NoneType in kinds and str not in kinds and value.lower() == NONE:
        return None
    return value if isinstance(value, dict) and any(hasattr(k, "model_fields") for k in kinds) else plain(value)


def _fitted_word(word: Word, kinds: list[Any], kind: Any) -> Any:
    may_be_empty = NoneType in kinds
    if str in kinds:
        if word.text == NONE and may_be_empty:
            return None
        return None if word.value is None and not word.typed else word.text  # in a file, null and ~ are not strings
    if any(get_origin(k) is Literal and word.text in get_args(k) for k in kinds):
        return word.text
    if may_be_empty and word.text.lower() == NONE:
        return None
    return fitted(word.value, kind) if isinstance(word.value, dict | list) else word.value


def options(kind: Any) -> Iterator[Any]:
    """The types that a type allows: the members of a union, without Annotated."""
    if get_origin(kind) is Annotated:
        yield from options(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            yield from options(one)
    else:
        yield kind


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with the changes merged into it, section by section."""
    out = dict(tree)
    for key, value in changes.items():
        before = out.get(key)
        out[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return out
