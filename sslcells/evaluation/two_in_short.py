"""What `sslcells compare-runs` answers, in a sentence each: is the second run better than the first, and where."""

from collections.abc import Mapping, Sequence
from typing import Any

from sslcells.evaluation.in_short import (
    FEW,
    NO,
    NONE_SEEN,
    PART,
    SOURCES,
    UNKNOWN,
    UNSEEN,
    YES,
    Answer,
    overall,
    points,
    verdict,
)
from sslcells.evaluation.scores import METRIC
from sslcells.evaluation.two_pictures import by

_SHOWN = 4
"""Classes, or settings, that a sentence names."""
_CHOICES = (".name", ".kind", ".recipe", ".backbone")
"""How keys end that other settings follow from: they are named first."""


def answers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions about `result`, what was found about two runs, with their answers."""
    found = [_better(result), _classes(result), _laboratories(result), _leaks(result), _settings(result)]
    return [one._asdict() for one in found if one is not None]


def basis(result: Mapping[str, Any]) -> str:
    """What the answers' intervals rest on."""
    units = units_of(result)
    what = f"{result['sources']:,} sources" if result["sources"] else f"{result['images']:,} images"
    text = f"In brackets 95 % intervals from {result['resamples']:,} resamples of {what}, the same for both runs."
    if not result["sources"]:
        text += " Sources are not known: where images share a donor, slide or photograph, the intervals are too narrow."
    elif units < FEW:
        text += " These are few, and the intervals too narrow."
    return (
        f"{text} They say how much other images could change the difference. Another seed of the trainings changes it "
        f"too, which is not in them: to tell settings apart, train each with several seeds."
    )


def units_of(result: Mapping[str, Any]) -> int:
    """How many units the resamples draw."""
    return int(result["sources"] or result["images"])


def _better(result: Mapping[str, Any]) -> Answer:
    first, second = result["names"]
    rows = [row for row in result["scores"] if row["unit"] == "image"]
    verdicts = [verdict(row["difference"][METRIC], units_of(result)) for row in rows]
    clauses = [
        f"by {by(row['method'])} {_meant(said, row['difference'][METRIC], first, second)}"
        for said, row in zip(verdicts, rows, strict=True)
    ]
    of = f" of {result['sources']:,} sources" if result["sources"] else ""
    split = f" (the {result['asked']} split)" if result["asked"] else ""
    text = f"In {METRIC} {'; '.join(clauses)}. Tested on the same {result['images']:,} images{of}{split}."
    said = overall(verdicts)
    return Answer(f"Is {second} better than {first}?", said, text, said in (NO, PART))


def _meant(said: str, score: Mapping[str, float | None], first: str, second: str) -> str:
    if said == UNSEEN:
        return f"no difference that can be told from chance, {points(score)}"
    if said == UNKNOWN:
        return f"{points(score)}, of fewer than {SOURCES} sources: too few to say"
    word = "better" if said == YES else "worse"
    return f"{second} is {word} than {first} by {points(score).lstrip('+-')}"


def _classes(result: Mapping[str, Any]) -> Answer:
    question = "Which classes make the difference?"
    units = units_of(result)
    rows = [(row, verdict(row["difference"], units)) for row in result["by class"]]
    better, worse = ([row for row, said in rows if said == kind] for kind in (YES, NO))
    by_method = f"In recall by {by(result['method'])}"
    if not better and not worse:
        return Answer(question, NONE_SEEN, f"{by_method} no class has a difference that can be told from chance.")
    parts = [
        f"{word} on {_named([(row['class'], row['difference']) for row in some])}"
        for word, some in (("better", better), ("worse", worse))
        if some
    ]
    text = f"{by_method} {result['names'][1]} is {'; '.join(parts)}. Of many classes, one in twenty differs by chance."
    return Answer(question, "some", text)


def _named(classes: Sequence[tuple[str, Mapping[str, float | None]]]) -> str:
    largest = sorted(classes, key=lambda of: -abs(of[1]["value"] or 0.0))
    named = ", ".join(f"{name} ({points(score)})" for name, score in largest[:_SHOWN])
    left = len(largest) - _SHOWN
    return named + (f" and {left} more" if left > 0 else "")


def _laboratories(result: Mapping[str, Any]) -> Answer | None:
    """None where no laboratory was asked about in both."""
    first, second = result["names"]
    rows = [row for row in result["labs"] if row["method"].startswith("kNN")]
    if not rows:
        return None
    verdicts = [verdict(row["difference"][METRIC], units_of(row)) for row in rows]
    clauses = [
        f"in {row['lab']} {_meant(said, row['difference'][METRIC], first, second)}"
        for said, row in zip(verdicts, rows, strict=True)
    ]
    said = overall(verdicts)
    text = f"In {METRIC} by kNN, by the labels of other laboratories, {'; '.join(clauses)}."
    return Answer(f"Is {second} better in another laboratory?", said, text, said in (NO, PART))


def _leaks(result: Mapping[str, Any]) -> Answer:
    question = "Does a leak from train make one of them too high?"
    said = [(name, one) for name, one in zip(result["names"], result["leaks"], strict=True) if one is not None]
    if not said:
        return Answer(question, UNKNOWN, "Their evaluations do not say.")
    warned = any(one["warning"] for _, one in said)
    verdicts = {one["verdict"] for _, one in said}
    verdict_of_both = "perhaps" if warned else verdicts.pop() if len(verdicts) == 1 else UNKNOWN
    if len({one["text"] for _, one in said}) == 1:
        return Answer(question, verdict_of_both, f"Of both: {said[0][1]['text']}", warned)
    return Answer(question, verdict_of_both, " ".join(f"{name}: {one['text']}" for name, one in said), warned)


def _settings(result: Mapping[str, Any]) -> Answer:
    question, rows = "What was set differently?", result["settings"]
    if any(made["method"] == "not known" for made in result["made"]):
        return Answer(question, UNKNOWN, "The folder of a run is not there.")
    if not rows:
        return Answer(question, "nothing", "Their configurations are the same, but for name and place.")
    first = sorted(rows, key=lambda row: not row[0].endswith(_CHOICES))
    named = ", ".join(f"{key} {one} → {its}" for key, one, its in first[:_SHOWN])
    left = len(rows) - _SHOWN
    count = f"{len(rows)} setting{'s' * (len(rows) > 1)}"
    return Answer(question, count, named + (f", and {left} more in the table below." if left > 0 else "."))
