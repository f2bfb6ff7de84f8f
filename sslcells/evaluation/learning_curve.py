"""Whether more training would help, from the figures on val along a run's training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

QUESTION = "Would more training help?"
GAIN = 0.01
"""A rise over half of the training that is worth another run."""
LOOKS = 5
"""looks at val in the second half of training that a trend needs"""
_KEYS = {
    "knn/balanced": "kNN's balanced accuracy on val",
    "val/balanced": "the classifier's balanced accuracy on val",
    "val/auroc": "the classifier's AUROC on val",
    "knn_loo/balanced": "kNN's balanced accuracy inside train",
}


class Trend(NamedTuple):
    """The change of a figure over the second half of a training: that of a straight line, with its 95 % interval."""

    value: float
    low: float
    high: float
    looks: int
    best_step: int


def more_training(metrics: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, bool]:
    """Question, verdict, sentence, and whether it warns, from the rows of metrics.jsonl."""
    key = next((key for key in _KEYS if any(_finite(row.get(key)) for row in metrics)), None)
    if key is None:
        return QUESTION, "not known", "Training logged no figure on val: it needs labels and evaluate.holdout.", False
    steps, values = _series(metrics, key)
    found = trend(steps, values)
    if found is None:
        text = (
            f"{_sentence(_KEYS[key])} was looked at {len(values)} times; a trend needs {LOOKS} looks in the second half"
        )
        return QUESTION, "not known", f"{text}: a smaller evaluate.every_epochs.", False
    change = f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    text = f"{_sentence(_KEYS[key])} {{}} over the second half of training, {change}"
    if found.low > 0 and found.value >= GAIN:
        return QUESTION, "likely", f"{text.format('still rose')}: try a run with more train.total_epochs.", False
    if found.high < 0:
        fell = f"{text.format('fell')}; it was best at step {found.best_step:,}"
        return QUESTION, "no", f"{fell}, and a shorter run may do better.", True
    if found.high < GAIN:
        return QUESTION, "no", f"{text.format('hardly rose')}: less than {100 * GAIN:.0f} point is to be had.", False
    return QUESTION, "no rise seen", f"{text.format('moved both ways')}: it may still rise, or not.", False


def trend(steps: Sequence[int], values: Sequence[float]) -> Trend | None:
    """A straight line through the looks of the second half; None for fewer than LOOKS of them."""
    from scipy import stats  # takes half a second

    half = [(step, value) for step, value in zip(steps, values, strict=True) if step >= steps[-1] / 2]
    if len(half) < LOOKS:
        return None
    x, y = np.array(half, float).T
    line = stats.linregress(x, y)
    span = float(x[-1] - x[0])
    deviation = float(line.stderr) if np.ptp(y) else 0.0  # of equal values it is NaN
    error = span * deviation * float(stats.t.ppf(0.975, len(half) - 2))
    value = span * float(line.slope)
    return Trend(value, value - error, value + error, len(half), steps[int(np.argmax(values))])


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values; of a step that was logged again after a resume, the last value."""
    value = {row["step"]: float(row[key]) for row in metrics if _finite(row.get(key))}
    return sorted(value), [value[step] for step in sorted(value)]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] if text[0].islower() and not text.startswith("kNN") else text
