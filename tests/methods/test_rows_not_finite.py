"""Rows that are not finite: no method's loss hides them, on one rank or on two."""

import copy
import math
from itertools import product

import pytest
import torch
from gloo import on_ranks
from test_contract import CASES, IMAGES, Images, needed

from sslcells import methods, ranks
from sslcells.config import PLUGINS
from sslcells.data import Batch
from sslcells.models import tokens

FEATURES = 8
CASE_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def rows_of(name, options):
    """A method, and its outputs for all views of 8 images, some of them unlabelled, as its loss takes them."""
    torch.manual_seed(0)
    kind = PLUGINS["method"].config(name)
    small = {k: v for k, v in {"norm": "layer", "hidden": 16, "dimension": 8}.items() if k in kind.model_fields}
    layout = tokens.Layout((8, 8), (4, 4), FEATURES, 1, "avg")
    method = methods.build(kind(**{**small, **needed(name), **options}), FEATURES, Images(), layout)
    features = torch.randn(method.views_in_all * IMAGES, FEATURES)
    with torch.no_grad():
        copied = method.teacher_copies()
        teacher = None if copied is None else copied(features[: method.views * IMAGES])
        if method.frozen_teacher:
            teacher = torch.randn(method.views * IMAGES, method.frozen_teacher.features)
        rows, patches = method(features, 0.0), None
        if isinstance(method, methods.Masked):
            hidden = torch.randn(2, 6, rows.shape[1])
            patches = methods.Patches(*hidden, torch.full((6,), 0.5))
        outputs = methods.Outputs(rows, teacher, features[: method.views * IMAGES], patches)
    image = torch.arange(IMAGES)
    label = image % 3 if options.get("loss") == "bce" else torch.where(image < 6, image % 3, -1)
    return method, outputs, Batch(torch.zeros(IMAGES, 1, 1, 1), label, image, image // 2, 0 * image, 0 * image)


def loss(made, plant, teachers=False):
    """Its loss on rows, the student's or the teacher's of which `plant` may change, and the student's gradient."""
    method, outputs, batch = copy.deepcopy(made)
    plant(outputs.teacher if teachers else outputs.rows)
    outputs.rows.requires_grad_()
    value, _ = method.loss(outputs, batch, 0.0)
    value.backward()
    return value, outputs.rows.grad


@pytest.mark.parametrize(("name", "options"), CASES, ids=CASE_IDS)
def test_a_loss_of_rows_that_are_not_finite_is_not_finite(name, options):
    made = rows_of(name, options)
    value, grad = loss(made, lambda rows: None)
    assert value.isfinite()
    assert grad.isfinite().all()
    whose = (False,) if made[1].teacher is None else (False, True)
    for teachers, (bad, number) in product(whose, BAD.items()):
        for row in (0, IMAGES - 1):  # the class of the last image is not known
            value, _ = loss(made, lambda rows, row=row, x=number: rows[row].fill_(x), teachers)
            assert not value.isfinite(), f"row {row} is {bad}"
            value, _ = loss(made, lambda rows, row=row, x=number: rows[row, :1].fill_(x), teachers)
            assert not value.isfinite(), f"a number of row {row} is {bad}"
        value, grad = loss(made, lambda rows, x=number: rows.fill_(x), teachers)
        assert not value.isfinite(), f"all rows are {bad}"
        assert not grad.isfinite().all()


def on_a_rank(cases):
    """Losses of halves of the rows, one of rank 1 being NaN, as each rank sees them."""
    values = []
    for name, options in cases:
        method, outputs, batch = rows_of(name, options)
        half = IMAGES // ranks.world()
        part = slice(ranks.rank() * half, (ranks.rank() + 1) * half)
        own = [None if x is None else x.view(-1, IMAGES, x.shape[1])[:, part].flatten(0, 1) for x in outputs[:3]]
        if ranks.rank() == 1:
            for rows in own:
                if rows is not None:
                    rows[0] = math.nan
        own.append(outputs.patches)
        values.append(method.loss(methods.Outputs(*own), Batch(*(x[part] for x in batch)), 0.0)[0].detach())
    return torch.stack(values)


PER_ROW = {"supervised", "dino", "ibot", "mae", "byol", "simsiam", "arcface", "cosface", "sphereface"}
"""methods whose rows meet no other rank's: the mean over ranks shows what one of them has"""


def meets(name, options):
    """True if rows meet those of other ranks."""
    return name not in PER_ROW or options.get("centring") == "sinkhorn"


def test_two_ranks_see_the_row_of_one():
    mine, theirs = on_ranks(2, on_a_rank, CASES)
    seen = {case: (not a.isfinite(), not b.isfinite()) for case, a, b in zip(CASE_IDS, mine, theirs, strict=True)}
    expected = {case: (meets(*which), True) for case, which in zip(CASE_IDS, CASES, strict=True)}
    assert seen == expected
