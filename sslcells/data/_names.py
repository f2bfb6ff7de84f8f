"""Names of files as people and operating systems spell them: in tables, in folders, and as classes."""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

from sslcells.config import ConfigError


def tidy(path: str) -> str:
    """The path with forward slashes, without `./` and doubled slashes."""
    if "\\" in path:
        path = path.replace("\\", "/")
    if path.startswith("./") or "//" in path or "/./" in path:
        lead = "/" * path.startswith("/")
        path = lead + "/".join(part for part in path.split("/") if part not in ("", "."))
    return path


def composed(name: str) -> str:
    """The name with composed letters (Unicode NFC); macOS may write ü as u and a dot above it (NFD)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def folded(name: str) -> str:
    """The name without differences of letter case."""
    return composed(composed(name).casefold())


def respelt(wanted: Iterable[str], there: Collection[str]) -> dict[str, str]:
    """For each name in `wanted` that is not in `there`, the name in `there` that it must mean.

    Slashes and composed letters are compared first, then also without letter case. A name that could mean several, or
    that shares its only match with another one, has none.
    """
    known = there if isinstance(there, (set, frozenset, dict)) else set(there)
    left = [name for name in wanted if name not in known]
    found: dict[str, str] = {}
    if not left:
        return found
    free = set(known).difference(wanted)
    for loosen in (lambda name: composed(tidy(name)), lambda name: folded(tidy(name))):
        theirs, ours = _groups(free, loosen), _groups(left, loosen)
        for key, names in ours.items():
            if len(names) == 1 and len(theirs.get(key, ())) == 1:
                found[names[0]] = theirs[key][0]
        free -= set(found.values())
        left = [name for name in left if name not in found]
    return found


def _groups(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups = defaultdict[str, list[str]](list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def check_classes(names: Sequence[str], where: str, what: str = "classes") -> None:
    """Raise a ConfigError if two names differ only in letter case, blanks around them, or how letters are composed.

    They would be two classes, or whatever `what` says they are, for one.
    """
    for same in _groups(names, lambda name: folded(name.strip())).values():
        if len(same) > 1:
            each = " and ".join(map(repr, sorted(same)[:2]))
            raise ConfigError(f"{where}: the {what} {each} differ only in spelling; give both one name")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and … if there are more."""
    return ", ".join([*names[:most], *["…"] * (len(names) > most)])
