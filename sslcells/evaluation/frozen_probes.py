"""Logistic regression on the features of frozen encoders, from fractions of the labels: `compare --frozen`."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sslcells import ranks
from sslcells.config import Run
from sslcells.data import ImageSet
from sslcells.data.subset import labelled_index
from sslcells.evaluation.against import Encoding
from sslcells.evaluation.answers import FROZEN, Answer
from sslcells.evaluation.classifier import Predictions
from sslcells.evaluation.encode import Names, spread
from sslcells.evaluation.probe import Labelled, linear_probe
from sslcells.inputs import lab_rows
from sslcells.models.frozen import FrozenEncoder
from sslcells.standardise import Standard, standard_of

Asked = Mapping[str, Sequence[ImageSet]]
"""Images by what the answers are called: a split, laboratories; all labelled with classes of the run."""


def answers(
    encoder: FrozenEncoder, name: str, run: Run, splits: Mapping[str, ImageSet], asked: Asked, encoding: Encoding
) -> dict[str, list[Answer]]:
    """A probe's predictions for all that is asked, for each fraction and seed of `run.compare`.

    Each image is encoded once, and its C is chosen on val. Every rank calls this; rank 0 gets the answers, the others
    an empty dictionary.
    """
    train, val, most = splits["train"], splits.get("val"), run.evaluate.max_images
    rows = lab_rows_of(standard_of(encoder.standardise), splits, asked)

    def known(images: ImageSet, index: Tensor, what: str) -> Labelled:
        z = encoding.z(encoder, images, index.tolist(), what, rows)
        return Labelled(z, images.labels[index], images.sources[index])

    bank = known(train, labelled(train), "train")
    apart = val is not None and not any(val is one for parts in asked.values() for one in parts)
    chosen_on = known(val, labelled(val), "val") if val is not None and apart else None
    questions = {
        what: [known(images, labelled(images, most), what) for images in parts] for what, parts in asked.items()
    }
    if ranks.rank() > 0:
        return {}
    if chosen_on is not None and not len(chosen_on.labels):
        chosen_on = None
    out: dict[str, list[Answer]] = {what: [] for what in asked}
    query = _joined([one for parts in questions.values() for one in parts])
    place = torch.full((len(train),), -1, dtype=torch.int64)
    place[labelled(train)] = torch.arange(len(bank.labels))
    for fraction in run.compare.fractions:
        for seed in range(run.seed, run.seed + run.compare.seeds):
            learnt = place[labelled_index(train, fraction, seed)]
            some = bank.at(learnt[learnt >= 0].numpy())
            # The models that it stands beside learn from all of train too.
            probed = linear_probe(some, query, chosen_on, len(train.classes), seed, apart=False)
            if probed is None:
                continue
            first = 0
            for what, parts in questions.items():
                count = sum(len(one.labels) for one in parts)
                mine = slice(first, first + count)
                found = Predictions(
                    [n for images in asked[what] for n in Names(images, labelled(images, most).tolist())],
                    list(train.classes),
                    query.labels[mine],
                    query.sources[mine],
                    probed.scores[mine],
                )
                out[what].append(Answer(f"{FROZEN}{name}", fraction, seed, found))
                first += count
    return out


def lab_rows_of(standard: Standard | None, splits: Mapping[str, ImageSet], asked: Asked) -> Tensor | None:
    """(labs + 1, P) what stands for images of each laboratory, those that are asked included; as `inputs.lab_rows`.

    Every rank must call this.
    """
    own = splits["train"].lab_names
    left_out = {f"{lab} {i}": part for lab, parts in asked.items() if lab in own for i, part in enumerate(parts)}
    new = {lab: parts for lab, parts in asked.items() if lab not in (*own, *splits)}
    return lab_rows(standard, {**splits, **left_out}, new).rows


def labelled(images: ImageSet, most: int | None = None) -> Tensor:
    """Indices of the images whose class is known; of those that are read where only `most` are."""
    index = torch.tensor(spread(len(images), most), dtype=torch.int64)
    return index[images.labels[index] >= 0]


def _joined(parts: Sequence[Labelled]) -> Labelled:
    """Rows of several parts, one after the other."""
    return Labelled(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
