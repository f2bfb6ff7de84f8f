"""The global batches of each sampler, for any number of ranks and from any step."""

from itertools import chain

import pytest
import torch
from gloo import on_ranks

from sslcells import ranks
from sslcells.config import ConfigError, Sampler
from sslcells.data import Batch, ImageSet
from sslcells.data.composition import composition
from sslcells.data.sampler import Shuffle, Steps, build, occurrences


class Images(ImageSet):
    channels = 1

    def __init__(self, labels, sources=None):
        self.labels = torch.tensor(labels)
        self.sources = torch.arange(len(labels)) if sources is None else torch.tensor(sources)
        self.classes = tuple(f"class {c}" for c in range(1 + max(labels)))

    def pixels(self, index):
        raise NotImplementedError

    def name(self, index):
        return str(index)


def unbalanced(*sizes):
    return list(chain.from_iterable([c] * size for c, size in enumerate(sizes)))


LABELS = [*unbalanced(3, 40, 17, 9, 31), -1, -1]
SOURCES = [i // 3 for i in range(len(LABELS))]  # 34 of 3 images
IMAGES = Images(LABELS, SOURCES)
KINDS = {
    "shuffle": ({}, 12),
    "balanced": ({}, 12),
    "classes": ({"per_class": 3}, 12),
    "sources": ({"per_source": 1}, 12),
}


def sampling(kind, images=IMAGES, global_batch=12, seed=1, **options):
    return build(Sampler(kind=kind, **options), images, global_batch, seed)


def steps(kind, rank=0, world=1, start=0, stop=40, seed=1):
    options, size = KINDS[kind]
    order = Steps(sampling(kind, global_batch=size, seed=seed, **options), rank, world, start, stop)
    return [[pick.image for pick in picks] for picks in order]


def mistake(kind, images=IMAGES, global_batch=12, **options):
    with pytest.raises(ConfigError) as error:
        sampling(kind, images, global_batch, **options)
    return str(error.value)


def counts(batches, ids):
    return torch.tensor(ids)[torch.tensor(list(chain.from_iterable(batches)))].bincount()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_global_batch_is_the_same_for_any_world(kind, world):
    parts = [steps(kind, rank, world) for rank in range(world)]
    assert [list(chain.from_iterable(p)) for p in zip(*parts, strict=True)] == steps(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [1, 7, 8, 9, 33])
def test_starting_later_continues_the_same_order(kind, start):
    assert steps(kind, start=start) == steps(kind)[start:]


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_differ(kind):
    assert steps(kind, seed=1) == steps(kind, seed=1)
    assert steps(kind, seed=1) != steps(kind, seed=2)


def test_an_epoch_of_shuffle_holds_every_image_at_most_once():
    order = Shuffle(50, 12, 1)
    epochs = [torch.cat([order.batch(4 * epoch + i) for i in range(4)]) for epoch in range(2)]
    assert len(epochs[0].unique()) == 48
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[1], torch.cat([Shuffle(50, 12, 2).batch(i) for i in range(4)]))


def test_balanced_shows_every_class_equally_often():
    for batch in steps("balanced"):
        assert sorted(counts([batch], LABELS).tolist()) == [2, 2, 2, 3, 3]
    assert counts(steps("balanced"), LABELS).tolist() == [96] * 5  # 40 batches of 12


@pytest.mark.parametrize("kind", ["balanced", "classes"])
def test_every_image_of_a_class_equally_often(kind):
    seen = counts(steps(kind, stop=500), range(len(LABELS)))
    for c in range(5):
        own = seen[torch.tensor(LABELS[: len(seen)]) == c]
        assert own.max() - own.min() <= 1
        assert own.min() > 0
    assert len(seen) <= 100  # the last two have no label


@pytest.mark.parametrize("kind", ["balanced", "classes", "sources"])
def test_no_image_twice_in_a_batch(kind):
    for batch in steps(kind, stop=500):
        assert len(set(batch)) == len(batch)


def test_a_class_smaller_than_its_share_is_repeated():
    images = Images(unbalanced(2, 50))
    batch = sampling("balanced", images, 12).batch(0)
    assert batch[images.labels[batch] == 0].bincount().tolist() == [3, 3]
    assert "repeated within a batch: 1" in sampling("balanced", images, 12).describe()


@pytest.mark.parametrize(
    ("sizes", "each", "global_batch"), [((9,) * 20, 4, 32), ((5, 6, 7, 8), 5, 10), ((4,) * 7, 4, 24)]
)
def test_p_classes_of_k_images(sizes, each, global_batch):
    images = Images(unbalanced(*sizes))
    order = sampling("classes", images, global_batch, per_class=each)
    met = set()
    for step in range(300):
        batch = order.batch(step)
        assert len(batch.unique()) == global_batch
        classes, of_each = images.labels[batch].unique(return_counts=True)
        assert of_each.tolist() == [each] * (global_batch // each)
        met |= {(a, b) for a in classes.tolist() for b in classes.tolist()}
    assert len(met) == len(sizes) ** 2  # every two classes come together
    assert order.batch(0)[: global_batch // each].tolist() != order.batch(1)[: global_batch // each].tolist()


def test_a_part_of_a_global_batch_holds_many_classes():
    images = Images(unbalanced(*[8] * 6))
    part = [pick.image for pick in next(iter(Steps(sampling("classes", images, 24, per_class=4), 1, 2, 0, 1)))]
    assert images.labels[part].bincount().tolist() == [2] * 6


@pytest.mark.parametrize("each", [1, 2, 3])
def test_no_more_than_so_many_of_a_source(each):
    order = sampling("sources", per_source=each)
    for step in range(100):
        assert IMAGES.sources[order.batch(step)].bincount().unique().tolist() == [0, each]
    seen = IMAGES.sources[torch.cat([order.batch(step) for step in range(34)])].bincount()
    assert seen.tolist() == [12] * 34


def test_mistakes_are_named_with_numbers():
    for kind in ("balanced", "classes"):
        assert "needs labels, train has none; use sampler.kind=shuffle" in mistake(kind, Images([-1] * 20))
    assert mistake("classes", per_class=5) == "sampler.per_class=5 does not divide train.global_batch=12; 4 does"
    assert mistake("classes", per_class=2) == (
        "sampler.per_class=2 with train.global_batch=12 needs 6 classes in a batch; the train split has 5: "
        "train.global_batch may be at most 10"
    )
    assert mistake("classes", per_class=4) == (
        "sampler.per_class=4: 1 of 5 classes have fewer images; the smallest has 3"
    )
    few = mistake("sources", global_batch=35)
    assert "needs 35 sources in a batch; the train split has 34: train.global_batch may be at most 34" in few
    small = mistake("sources", per_source=4)
    assert small == "sampler.per_source=4: 34 of 34 sources have fewer images; the smallest has 3"


def test_descriptions_say_what_is_done():
    assert sampling("shuffle").describe() == "every image once per epoch, except 6 that do not fill a batch"
    assert sampling("balanced").describe() == (
        "2 or 3 images of each of 5 classes in a global batch; an epoch shows an image of 'class 0' (3 images) "
        "6.67 times and an image of 'class 1' (40 images) 0.5 times; 2 images without a class are not drawn"
    )
    assert sampling("classes", per_class=3).describe() == (
        "4 of 5 classes in a global batch, 3 different images of each; every class equally often, although they "
        "have 3 to 40 images; 2 images without a class are not drawn"
    )


@pytest.mark.parametrize("ids", [[], [7], [3, 1, 3, 3, 1, 2], [5] * 9, list(range(6)), [-1, 4, -1, 4, -1]])
def test_occurrences_count_the_equal_ids_before(ids):
    assert occurrences(torch.tensor(ids, dtype=torch.int64)).tolist() == [ids[:i].count(x) for i, x in enumerate(ids)]


def test_only_a_sampler_that_repeats_images_says_so():
    assert sampling("balanced", global_batch=30).repeats  # 6 a batch of a class of 3
    assert not sampling("balanced", global_batch=12).repeats  # 3 at the most
    assert not any(sampling(kind, **options).repeats for kind, (options, _) in KINDS.items())


LABEL, SOURCE, LAB = [0, 0, 1, 1, 1, -1, 2, 2], [0, 0, 0, 1, 1, 2, 3, 4], [1, 1, 2, 0, 2, 2, 1, 0]


def held():
    part = 8 // ranks.world()
    own = slice(ranks.rank() * part, (ranks.rank() + 1) * part)
    label, source, lab = (torch.tensor(ids)[own] for ids in (LABEL, SOURCE, LAB))
    return composition(Batch(torch.zeros(part, 1, 1, 1), label, label, source, lab, 0 * label), torch.device("cpu"))


def by_hand(ids):
    return sum(sum(b == a for j, b in enumerate(ids) if j != i) / (len(ids) - 1) for i, a in enumerate(ids)) / len(ids)


@pytest.mark.parametrize("world", [2, 4])
def test_false_negatives_are_counted_over_the_global_batch(world):
    want = {
        "batch/same_source": by_hand(SOURCE),
        "batch/same_label": by_hand([c for c in LABEL if c >= 0]),
        "batch/same_lab": by_hand([c for c in LAB if c > 0]),
    }
    assert held() == pytest.approx(want)
    assert on_ranks(world, held) == [held()] * world


def test_no_labels_no_figure():
    none = torch.full((4,), -1)
    batch = Batch(torch.zeros(4, 1, 1, 1), none, torch.arange(4), torch.arange(4), none * 0, none * 0)
    assert composition(batch, torch.device("cpu")) == {"batch/same_source": 0}


BLOCKED = {"images": 1000, "global_batch": 12, "seed": 1, "block": 7}


def test_blocks_are_drawn_together_and_mixed():
    sampling = Shuffle(**BLOCKED)
    assert sampling.together == 16
    epochs = [torch.cat([sampling.batch(83 * epoch + i) for i in range(83)]) for epoch in range(2)]
    for epoch in epochs:
        assert len(epoch.unique()) == 996
        first = epoch[: 16 * 7]
        assert len((first // 7).unique()) <= 17  # the last block is a short one
        assert len((epoch[:12] // 7).unique()) > 6
        assert not torch.equal(first.sort().values, first)
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0][:112].sort().values, epochs[1][:112].sort().values)
    assert Shuffle(**BLOCKED | {"global_batch": 600}).together == 172
    assert "16 blocks of 7 images are mixed" in sampling.describe()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_blocks_are_the_same_for_any_world_and_start(world):
    def of(rank, world, start):
        return [[pick.image for pick in picks] for picks in Steps(Shuffle(**BLOCKED), rank, world, start, 200)]

    whole = [Shuffle(**BLOCKED).batch(step).tolist() for step in range(200)]
    parts = zip(*[of(rank, world, 90) for rank in range(world)], strict=True)
    assert [list(chain.from_iterable(part)) for part in parts] == whole[90:]


def test_blocks_are_of_shuffle_alone():
    with pytest.raises(ValueError, match="block=8 is for kind=shuffle, not for kind=balanced"):
        Sampler(kind="balanced", block=8)
