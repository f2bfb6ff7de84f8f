"""Planted leaks are named, and nothing else is."""

import pytest
import torch

from sslcells.evaluation.leaks import SplitFeatures, copies, digests, histograms, leaks

CLASSES = ("round", "square")


def images(n, seed, size=12):
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def features_of(pixels, name, sources=None, labels=None, z=None):
    n = len(pixels)
    return SplitFeatures(
        digests(pixels),
        histograms(pixels),
        pixels.float().flatten(1) / 255 if z is None else z,
        torch.arange(n) % 2 if labels is None else labels,
        torch.arange(n) + 1000 * len(name) if sources is None else sources,
        [f"{name}/{i}" for i in range(n)],
    )


def found(train, test, near=None):
    return leaks({"train": train, "test": test}, "test", CLASSES, near, 0)


def warnings_of(result):
    return [f["text"] for f in result["findings"] if f["warning"]]


def test_nothing_planted_is_nothing_found():
    result = found(features_of(images(40, 0), "train"), features_of(images(20, 1), "test"))
    assert warnings_of(result) == []
    assert not result["sources known"]
    assert "sources are unknown" in " ".join(f["text"] for f in result["findings"])


def test_an_exact_duplicate_is_named():
    train, test = images(40, 0), images(20, 1)
    test[7] = train[31]
    result = found(features_of(train, "train"), features_of(test, "test"))
    assert result["exact duplicates"]["train and test"] == {"count": 1, "examples": [["train/31", "test/7"]]}
    assert "1 image of test is in train too, byte for byte, such as train/31 and test/7" in warnings_of(result)


def test_a_duplicate_with_another_label_is_called_out():
    train = images(40, 0)
    train[5] = train[4]
    result = found(features_of(train, "train"), features_of(images(20, 1), "test"))
    assert any("1 of them with another label" in text for text in warnings_of(result))


def test_a_source_in_two_splits_is_named():
    sources = torch.arange(40) // 4
    result = found(
        features_of(images(40, 0), "train", sources), features_of(images(20, 1), "test", torch.arange(20) // 4 + 9)
    )
    assert result["sources"]["train and test"]["count"] == 1
    assert result["sources"]["train and test"]["images"] == {"train": 4, "test": 4}
    assert any(text.startswith("1 source in both train and test (4 images and 4)") for text in warnings_of(result))
    assert result["images"]["train"]["classes"]["round"] == {"images": 20, "sources": 10}


def test_a_class_missing_in_a_split_is_named():
    result = found(
        features_of(images(40, 0), "train"), features_of(images(9, 1), "test", labels=torch.zeros(9, dtype=torch.int64))
    )
    assert "test shows no square" in warnings_of(result)


@pytest.mark.parametrize("planted", [0, 12])
def test_near_duplicates_are_found_by_features(planted):
    """Features that turn and cut do not change much, and test images that are copies of train's."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 16, generator=generator)
    test = torch.randn(200, 16, generator=generator)
    test[:planted] = z[:planted] + 0.05 * torch.randn(planted, 16, generator=generator)
    near = z[:100], z[:100] + 0.05 * torch.randn(100, 16, generator=generator)
    result = found(features_of(images(400, 0), "train", z=z), features_of(images(200, 1), "test", z=test), near)
    near = result["near duplicates"]
    assert near["copies found"] > 0.9
    assert near["train and test"]["images"] == pytest.approx(planted, abs=1)
    assert any("lie nearer to one of train" in text for text in warnings_of(result)) == bool(planted)


def test_collapsed_features_find_no_near_duplicates_and_say_so():
    one = torch.ones(40, 8)
    train, test = features_of(images(40, 0), "train", z=one), features_of(images(20, 1), "test", z=one[:20])
    result = found(train, test, (one, one))
    assert result["near duplicates"]["train and test"]["images"] == 0
    assert any("finds only 0% of copies" in text for text in warnings_of(result))


def test_a_random_split_of_augmented_copies_is_called_worthless():
    """Each source has a colour and ten images; the class has nothing to do with the colour."""

    def of(sources, seed):
        generator = torch.Generator().manual_seed(seed)
        colour = torch.randint(30, 220, (sources, 3), generator=generator).repeat_interleave(10, 0)
        noise = torch.randint(12, (10 * sources, 3, 12, 12), generator=generator)
        return (colour[..., None, None] + noise).byte(), torch.arange(10 * sources) // 10

    pixels, source = of(60, 0)
    asked, other = of(30, 1)
    label = torch.randint(2, (60,), generator=torch.Generator().manual_seed(2))[source]
    train = features_of(pixels, "train", source, label)
    result = found(train, features_of(asked, "test", other + 500, other % 2))
    assert result["shortcut"]["random split of train"]["top1"] > 0.95
    assert result["shortcut"]["random split of train, own source left out"]["top1"] < 0.7
    assert any("a random split of train is worthless" in text for text in warnings_of(result))


def test_histograms_and_digests_are_of_the_pixels():
    x = images(3, 0)
    x[1] = x[0]
    assert histograms(x).shape == (3, 48)
    assert histograms(x).view(3, 3, 16).sum(2).allclose(torch.ones(3, 3))
    assert int(histograms(x)[2, 16] * 144 + 0.5) == int((x[2, 1] < 16).sum())
    d = digests(x)
    assert torch.equal(d[0], d[1])
    assert not torch.equal(d[0], d[2])


@pytest.mark.parametrize("size", [(12, 12), (9, 14)])
def test_copies_are_moved_and_of_the_same_size(size):
    x = torch.randint(256, (12, 3, *size), dtype=torch.uint8)
    y = copies(x, torch.arange(12))
    assert y.shape == x.shape
    assert y.dtype == torch.uint8
    assert (y.float() - x.float()).abs().mean((1, 2, 3)).min() > 5
