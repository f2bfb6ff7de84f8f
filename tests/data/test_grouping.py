"""Parts that share no group, in 1,000 random tables, and how near to their shares they come."""

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from sslcells.data.grouping import divide, groups_of


def random_table(seed):
    random = np.random.default_rng(seed)
    rows = int(random.integers(6, 120))
    keys = [
        [None if random.random() < 0.1 else str(v) for v in random.integers(0, random.integers(2, rows), rows)]
        for _ in range(int(random.integers(1, 3)))
    ]
    return keys, random.integers(-1, random.integers(1, 5), rows), random.dirichlet([3, 3, 3])[: random.integers(2, 4)]


def test_nothing_is_shared_in_1000_random_tables():
    divided = 0
    for seed in range(1000):
        keys, kind, shares = random_table(seed)
        group = groups_of(keys)
        part = divide(group, kind, [str(g) for g in range(group.max() + 1)], shares, seed)
        for key in keys:
            for value in {*key} - {None}:
                assert len({p for p, v in zip(part, key, strict=True) if v == value}) == 1
        if group.max() + 1 >= len(shares):
            divided += 1
            assert {*part} == {*range(len(shares))}
    assert divided > 500


def test_groups_join_through_each_other():
    group = groups_of([["a", "a", "b", None, None, "c"], ["1", "2", "2", "3", None, "3"]])
    assert group.tolist() == [0, 0, 0, 1, 2, 1]


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does():
    random = np.random.default_rng(0)
    donor, kind = random.integers(0, 40, 400), random.integers(0, 3, 400)
    names = [f"d{g}" for g in range(40)]
    part = divide(donor, kind, names, (0.7, 0.1, 0.2))
    turned = random.permutation(400)
    assert (divide(donor[turned], kind[turned], names, (0.7, 0.1, 0.2)) == part[turned]).all()
    assert (divide(donor, kind, names, (0.7, 0.1, 0.2), seed=1) != part).any()


def unlike(part, kind, shares):
    """Mean distance of what each part has of each class, and of all, from its share."""
    of = [
        [(part[rows] == p).mean() for p in range(len(shares))]
        for rows in (kind == kind, *(kind == k for k in set(kind)))
    ]
    return np.abs(np.array(of) - shares).mean()


def test_as_near_to_the_shares_as_scikit_learn():
    ours, theirs = [], []
    for seed in range(12):
        random = np.random.default_rng(seed)
        size = random.geometric(0.05, 30)
        group = np.repeat(np.arange(30), size)
        kind = np.concatenate([random.choice(4, n, p=random.dirichlet([0.5] * 4)) for n in size])
        shares = np.full(5, 0.2)
        ours.append(unlike(divide(group, kind, [str(g) for g in range(30)], shares, seed), kind, shares))
        part = np.zeros_like(group)
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(group, kind, group)
        for p, (_, test) in enumerate(folds):
            part[test] = p
        theirs.append(unlike(part, kind, shares))
    assert np.mean(ours) < np.mean(theirs)
    assert np.mean(ours) < 0.05
