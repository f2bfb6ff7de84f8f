"""What `sslcells compare` answers, in a sentence each: is the run's encoder worth its training, and how much.

A model is better than another only where the interval of their difference, on the same resamples of the images that
are asked, leaves 0 out and every seed agrees.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sslcells.evaluation.answers import PAIRS
from sslcells.evaluation.in_short import NO, NOT_ASKED, PART, UNKNOWN, UNSEEN, YES, Answer, overall, points, verdict
from sslcells.evaluation.scores import METRIC

_QUESTIONS = (
    "Is the encoder a better start than none?",
    "Is it better as it is, frozen, than training without it?",
    "Is fine-tuning it worth more than leaving it frozen?",
)
"""of the models of each of PAIRS"""


def answers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers for comparison.json; `result` is what it holds besides them."""
    found = [
        _answer(_named(both, question, result), [of for of in result["pairs"] if (of["model"], of["against"]) == both])
        for both, question in zip(PAIRS, _QUESTIONS, strict=True)
    ]
    return [one._asdict() for one in [*found, _published(result), _labs(result)]]


def _named(both: tuple[str, str], question: str, result: Mapping[str, Any]) -> str:
    """The question; of published weights where the supervised model starts from these."""
    start = result["starts"].get("supervised", "from scratch")
    if start == "from scratch" or "supervised" not in both:
        return question
    return f"Is the encoder{', frozen,' * ('probe' in both)} better than training {start}?"


def _answer(question: str, found: Sequence[Mapping[str, Any]]) -> Answer:
    if not found:
        return Answer(
            question, UNKNOWN, "This is compared where each image has one class, and all models have answers."
        )
    verdicts = [_verdict(of) for of in found]
    clauses = [
        f"with {100 * of['fraction']:g} % of the labels {_meant(said, of)}"
        for said, of in zip(verdicts, found, strict=True)
    ]
    said = overall(verdicts)
    return Answer(question, said, f"In {METRIC}, {'; '.join(clauses)}.", said == NO)


def _verdict(of: Mapping[str, Any]) -> str:
    """As `in_short.verdict`; no difference is seen where the seeds disagree."""
    said = verdict(of["scores"][METRIC], of["units"])
    each = of["of each seed"]
    agree = min(each) > 0 if said == YES else max(each) < 0
    return UNSEEN if said in (YES, NO) and not agree else said


def _meant(said: str, of: Mapping[str, Any]) -> str:
    words = {YES: "better", NO: "worse", UNSEEN: "no difference seen", UNKNOWN: "too few sources to say"}
    each = of["of each seed"]
    spread = f", {100 * min(each):+.1f} to {100 * max(each):+.1f} by seed" if len(each) > 1 else ""
    return f"{words[said]}, {points(of['scores'][METRIC])}{spread}"


def _published(result: Mapping[str, Any]) -> Answer:
    question = "Is it better than published weights?"
    if not result["frozen"]:
        ask = "sslcells compare … --frozen NAME asks it; NAME is one of timm's weights, or a file."
        return Answer(question, NOT_ASKED, ask)
    units = min((of["units"] for of in result["pairs"]), default=0)
    verdicts = [verdict(of["scores"][METRIC], units) for of in result["differences"]]
    clauses = [f"{of['model']} beside {of['against']}: {points(of['scores'][METRIC])}" for of in result["differences"]]
    said = overall(verdicts)
    return Answer(question, said, f"With most labels, in {METRIC}: {'; '.join(clauses)}.", said in (NO, PART))


def _labs(result: Mapping[str, Any]) -> Answer:
    question = "Does it help in a laboratory that no model was trained on?"
    if not result["labs"]:
        return Answer(
            question, NOT_ASKED, "sslcells compare … --lab NAME=FOLDER asks it; FOLDER holds images by class."
        )
    best = [
        (lab["lab"], of)
        for lab in result["labs"]
        for of in lab["pairs"]
        if (of["model"], of["against"]) == PAIRS[0] and of["fraction"] == max(one["fraction"] for one in lab["pairs"])
    ]
    if not best:
        return Answer(question, UNKNOWN, "No laboratory has classes with enough images.")
    verdicts = [_verdict(of) for _, of in best]
    clauses = [f"{lab}: {_meant(said, of)}" for (lab, of), said in zip(best, verdicts, strict=True)]
    text = f"With most labels, fine-tuned beside trained without it, in {METRIC}: {'; '.join(clauses)}."
    return Answer(question, overall(verdicts), text, NO in verdicts)
