"""What a biologist asks of an evaluation, answered in a sentence each from its figures.

Better and worse are said only where the 95 % interval of a difference, on the same resamples, leaves 0 out; else no
difference is seen. What was not asked is said to be so, with the command that asks it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from sslcells.evaluation.baselines import COLOUR, METHOD, RUN, UNTRAINED
from sslcells.evaluation.learning_curve import more_training
from sslcells.evaluation.scores import METRIC
from sslcells.evaluation.tables import shown

YES, NO, UNSEEN, PART = "yes", "no", "no difference seen", "in part"
UNKNOWN, NOT_ASKED, NONE_SEEN = "not known", "not asked", "none seen"
SOURCES = 5
"""Units (sources, or images where each is its own) without which an interval says nothing."""
FEW = 10
"""Units below which intervals are too narrow."""
MARGIN = 0.05
"""A laboratory that loses less than that, with its whole interval, is as good by the others' labels as by its own."""
CONFUSED = 0.05
"""Share of a class that is taken for another, above which the two are confused."""
_SHOWN = 3


class Answer(NamedTuple):
    """A question with its answer."""

    question: str
    verdict: str
    text: str
    warning: bool = False


def answers(result: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The answers for evaluation.json, in the order of the questions.

    `result` is what evaluation.json holds besides them, `metrics` are the rows of the run's metrics.jsonl.
    """
    run = f"sslcells evaluate {quote(str(folder))}"
    found = [
        _baseline(result, COLOUR, "Is the encoder better than colour alone?", run),
        _baseline(result, UNTRAINED, "Is it better than the same network untrained?", run),
        _published(result, run),
        _labs(result, run),
        _confused(result),
        _leaks(result),
        more_training(metrics),
    ]
    return [Answer(*one)._asdict() for one in found]


def verdict(score: Mapping[str, float | None], units: int) -> str:
    """YES, NO or UNSEEN for a difference with its interval over so many units; UNKNOWN where these are too few."""
    low, high = score["low"], score["high"]
    if score["value"] is None or low is None or high is None or units < SOURCES:
        return UNKNOWN
    return YES if low > 0 else NO if high < 0 else UNSEEN


def overall(verdicts: Sequence[str]) -> str:
    """One verdict for several: YES or NO where all agree, UNSEEN where none is seen, else PART."""
    kinds = {*verdicts} - {UNKNOWN}
    if not kinds:
        return UNKNOWN
    if len(kinds) == 1:
        return kinds.pop()
    return PART if YES in kinds else NO


def points(score: Mapping[str, float | None]) -> str:
    """`+20.8 points [18.0, 23.5]`."""
    value, low, high = score["value"], score["low"], score["high"]
    if value is None:
        return "not defined"
    text = f"{100 * value:+.1f} points"
    return text if low is None or high is None else f"{text} [{100 * low:+.1f}, {100 * high:+.1f}]"


def units_of(row: Mapping[str, Any]) -> int:
    """How many units the resamples of a row of figures draw."""
    return int(row["images"] if row.get("sources") is None else row["sources"])


def basis(result: Mapping[str, Any]) -> str:
    """What the answers' intervals rest on, in a sentence; empty without figures."""
    row = next((r for r in result["figures"] if r["unit"] == "image" and r["task"] == "kNN"), None)
    if row is None:
        return ""
    text = f"Measured on the {result['asked']} split; in brackets 95 % intervals from {result['resamples']:,} resamples"
    if row["sources"] is None:
        text += f" of {row['images']:,} images. Sources are not known: where images share a donor, slide or photograph"
        return f"{text}, the intervals are too narrow."
    text += f" of {row['sources']:,} sources"
    return f"{text}: these are few, and the intervals too narrow." if row["sources"] < FEW else f"{text}."


def _unlabelled(result: Mapping[str, Any]) -> str:
    return "train has no labels" if result["asked"] else "no image has a single known class"


def _baseline(result: Mapping[str, Any], name: str, question: str, run: str) -> Answer:
    found = result["baselines"]
    if found is None:
        return Answer(question, UNKNOWN, f"This needs labels: {_unlabelled(result)}.")
    less = [of for of in found["differences"] if (of["baseline"], of["unit"]) == (name, "image")]
    if not less:
        said = [note for note in result["notes"] if note.startswith("with random weights")]
        if said:
            return Answer(question, UNKNOWN, f"{said[0][0].upper()}{said[0][1:]}.")
        return Answer(question, NOT_ASKED, f"{run} evaluate.untrained=true asks it.")
    of = {row["name"]: row for row in found["figures"] if row["unit"] == "image"}
    score = less[0]["scores"][METRIC]
    said_of = verdict(score, units_of(of[RUN]))
    text = f"{_reached(found['method'])} the encoder reaches {_percent(of[RUN])}, {_THE[name]} {_percent(of[name])}: "
    return Answer(question, said_of, f"{text}{_meant(said_of, score)}.", said_of in (NO, UNSEEN))


_THE = {COLOUR: "a histogram of each image's colours", UNTRAINED: "the network with random weights"}


def _reached(method: str) -> str:
    name, _, k = method.removesuffix(", weighted").partition(", ")
    return f"In {METRIC} by {name} ({k})"


def _percent(row: Mapping[str, Any]) -> str:
    score = row["scores"][METRIC]
    return f"{shown(score)} %" if score["low"] is None else shown(score).replace(" [", " % [")


def _meant(said: str, score: Mapping[str, float | None]) -> str:
    """A difference in words."""
    words = {
        YES: "better",
        NO: "worse",
        UNSEEN: "no difference seen",
        UNKNOWN: f"fewer than {SOURCES} sources are too few to say",
    }
    return f"{words[said]}, {points(score)}"


def _published(result: Mapping[str, Any], run: str) -> Answer:
    question = "Is it better than published weights?"
    if not result["against"]:
        if result["asked"] is None:
            return Answer(question, UNKNOWN, f"This needs labels: {_unlabelled(result)}.")
        return Answer(question, NOT_ASKED, f"{run} --against NAME asks it; NAME is one of timm's weights, or a file.")
    sizes = {r["unit"]: units_of(r) for r in result["figures"] if r["task"] == "kNN"}
    verdicts, sentences = [], []
    for one in result["against"]:
        each = [of for of in one["differences"] if of["unit"] == "image"]
        said = [(of, verdict(of["scores"][METRIC], sizes["image"])) for of in each]
        verdicts += [of for _, of in said]
        clauses = [f"{_meant(word, of['scores'][METRIC])} by {_short(of['method'])}" for of, word in said]
        sentences.append(f"{one['encoder']}, frozen: {'; '.join(clauses) or 'no classifier can be trained'}.")
    found = overall(verdicts)
    text = f"The run's {METRIC} beside " + " ".join(sentences)
    return Answer(question, found, text, found in (NO, PART))


def _short(method: str) -> str:
    return "kNN" if method == METHOD else method


def _labs(result: Mapping[str, Any], run: str) -> Answer:
    question = "Does it hold in another laboratory?"
    if not result["labs"]:
        if result["asked"] is None:
            return Answer(question, UNKNOWN, f"This needs labels: {_unlabelled(result)}.")
        ask = f"{run} --lab NAME=FOLDER asks one that training never saw"
        return Answer(question, NOT_ASKED, f"{ask}; FOLDER holds its images by class.")
    found = [(lab, *_of_lab(lab)) for lab in result["labs"]["labs"]]
    verdict_of_all = overall([said for _, said, _ in found])
    named = [
        f"{lab['lab']}{' (its images were trained on, its labels are left out)' * lab['trained on']}: {text}."
        for lab, _, text in found
    ]
    apart = [" and ".join(of["labs"]) for of in result["labs"]["pairs"] if _separates(of)]
    if apart:
        named.append(f"Neighbours follow the laboratory more than the class: {', '.join(apart)}.")
    text = " ".join(named) or "No laboratory has labels that others could be asked about."
    return Answer(question, verdict_of_all, text, verdict_of_all in (NO, PART) or bool(apart))


def _separates(pair: Mapping[str, Any]) -> bool:
    index = pair.get("robustness index")
    return index is not None and index["value"] is not None and index["value"] < 0.5


def _of_lab(lab: Mapping[str, Any]) -> tuple[str, str]:
    """Whether the others' labels do for a laboratory, and why: by no method may they lose, and by all surely not."""
    counted = lab["classes counted"]
    if not lab["others − own"] or len(counted) < 2:
        return UNKNOWN, f"{len(counted)} classes have enough images to be counted, and two are needed"
    found = [_by_method(lab, of) for of in lab["others − own"]]
    verdicts = [verdict_of for verdict_of, _, _ in found]
    text = "; ".join(clause for _, clause, _ in found)
    chance = 1 / len(counted)
    if all(low is not None and low <= chance for _, _, low in found):
        return NO, f"{text}. By the labels of the others it is not better than chance, {100 * chance:.0f} %"
    if UNKNOWN in verdicts:
        return UNKNOWN, text
    return NO if NO in verdicts else UNSEEN if UNSEEN in verdicts else YES, text


def _by_method(lab: Mapping[str, Any], less: Mapping[str, Any]) -> tuple[str, str, float | None]:
    """The verdict by one method, its clause, and the lower end of what the others' labels reach."""
    of = rows_of_lab(lab, less["method"])
    score, low = less["scores"][METRIC], of["the others"]["scores"][METRIC]["low"]
    text = (
        f"by {less['method'].partition(',')[0]} {_percent(of['the others'])} with the labels of the others, "
        f"{_percent(of['its own'])} with its own"
    )
    if verdict(score, units_of(of["its own"])) == UNKNOWN:
        return UNKNOWN, f"{text}, of fewer than {SOURCES} sources: too few to say", low
    said, words = UNSEEN, f"no difference seen, but it may lose more than {100 * MARGIN:.0f} points"
    if score["low"] > -MARGIN:
        said, words = YES, f"it loses less than {100 * MARGIN:.0f} points"
    elif score["high"] < 0:
        said, words = NO, "it loses"
    return said, f"{text}: {words}, {points(score)}", low


def rows_of_lab(lab: Mapping[str, Any], method: str) -> dict[str, Mapping[str, Any]]:
    """A laboratory's figures by image with all classes, by whose labels answer."""
    wanted = (method, "image", "all classes")
    return {row["labels of"]: row for row in lab["figures"] if (row["method"], row["unit"], row["among"]) == wanted}


def _confused(result: Mapping[str, Any]) -> Answer:
    question, found = "Which classes are confused?", result["confused"]
    if found is None:
        return Answer(question, UNKNOWN, f"This needs labels: {_unlabelled(result)}.")
    surely = [of for of in found["pairs"] if _bound(of, "low") > CONFUSED][:_SHOWN]
    perhaps = [of for of in found["pairs"] if _bound(of, "value") > CONFUSED and of not in surely][:_SHOWN]
    by = f"By {found['method'].partition(', C = ')[0]}: "
    few = f" Fewer than 10 images, not counted: {', '.join(found['few'])}." if found["few"] else ""
    if surely:
        text = f"{by}{'; '.join(map(_pair, surely))}.{few}"
        return Answer(question, "some", text, True)
    if perhaps:
        text = f"{by}perhaps {'; '.join(map(_pair, perhaps))}; the images are too few to say.{few}"
        return Answer(question, "not sure", text)
    most = f", the largest share is {_pair(found['pairs'][0])}" if found["pairs"] else ""
    return Answer(question, NONE_SEEN, f"{by}no class has more than {CONFUSED:.0%} taken for another{most}.{few}")


def _bound(pair: Mapping[str, Any], key: str) -> float:
    value = pair["share"][key]
    return 0.0 if value is None else float(value)


def _pair(of: Mapping[str, Any]) -> str:
    share = shown(of["share"])
    percent = share.replace(" [", " % [") if "[" in share else f"{share} %"
    return f"{percent} of {of['true']} are taken for {of['taken for']}"


def _leaks(result: Mapping[str, Any]) -> Answer:
    question, found = "What leaks from train?", result["leaks"]
    others = [split for split in found["images"] if split != "train"]
    if not others:
        return Answer(question, UNKNOWN, "There is no split beside train that could share images with it.")
    leaking = {split: text for split in others if (text := "; ".join(_shared(found, split)))}
    unknown = "sources are not known, so donors, slides or photographs on both sides cannot be seen"
    if leaking:
        why = "" if found["sources known"] else f" And {unknown}."
        sure = "are" if any("too, byte" in text or "in both" in text for text in leaking.values()) else "may be"
        text = f"{'; '.join(leaking.values())}: figures of {' and '.join(leaking)} {sure} too high.{why}"
        return Answer(question, "some", text, True)
    near = found["near duplicates"]
    looked = all(f"train and {split}" in near for split in others) and near["copies found"] >= 0.5
    nearly = ", and no more than by chance nearly" if looked else "; nearly equal ones would not have been found"
    text = f"No image of {' or '.join(others)} is in train too{nearly}"
    if not found["sources known"]:
        text = f"{text}; but {unknown}: data.sources names them, `sslcells sources` looks for them."
        return Answer(question, "sources not known", text)
    return Answer(
        question,
        NONE_SEEN if looked else "copies not known",
        f"{text}; no source (donor, slide, photograph) is in both.",
    )


def _shared(found: Mapping[str, Any], split: str) -> Iterator[str]:
    both = f"train and {split}"
    if count := found["exact duplicates"].get(both, {}).get("count", 0):
        yield f"{count:,} images of {split} are in train too, byte for byte"
    near = found["near duplicates"].get(both, {})
    if near.get("more than by chance"):
        yield f"{near['images']:,} of {near['of']:,} images of {split} lie as near to one of train as copies do"
    if count := found["sources"].get(both, {}).get("count", 0):
        yield f"{count:,} sources are in both, with {found['sources'][both]['images'][split]:,} images of {split}"
