import numpy as np
import pytest
import torch
from PIL import Image

from sslcells.evaluation import sheets
from sslcells.evaluation.sheets import neighbour_sheet, view_sheet


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved, to look into."""
    figures, save = [], sheets.save
    monkeypatch.setattr(sheets, "save", lambda figure, out: figures.append(figure) or save(figure, out))
    return figures


def shown(ax):
    """The image (H, W, C) that a cell of a sheet shows; matplotlib drops a single channel."""
    image = np.asarray(ax.images[0].get_array())
    return image if image.ndim == 3 else image[..., None]


def check_png(path, rows, columns):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.height > rows * 150
        assert image.width > columns * 150
        assert len(image.convert("RGB").getcolors(maxcolors=image.width * image.height)) > 20


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_view_sheet_undoes_the_normalisation_and_the_view_major_order(tmp_path, saved, channels, kept):
    pixels = torch.randint(256, (4, channels, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.1 * (c + 1) for c in range(channels)], [0.2 + 0.1 * c for c in range(channels)]
    plain = torch.cat([pixels, 255 - pixels]) / 255
    views = (plain - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    check_png(view_sheet(pixels, views, mean, std, tmp_path / "v.png", images=3), 3, 3)
    axes = np.array(saved[0].axes).reshape(3, 3)
    for row in range(3):
        image = pixels[row, :kept].permute(1, 2, 0).numpy()
        assert (shown(axes[row, 0]) == image).all()
        np.testing.assert_allclose(shown(axes[row, 1]), image / 255, atol=1e-6)
        np.testing.assert_allclose(shown(axes[row, 2]), 1 - image / 255, atol=1e-6)
    assert axes[0, 0].images[0].get_interpolation() == "nearest"
    assert ("channels" in saved[0].get_suptitle()) == (channels != kept)


def test_view_sheet_clamps_and_takes_one_mean_for_all_channels(tmp_path, saved):
    views = torch.full((2, 3, 8, 8), 9.0)
    view_sheet(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), views, (0.5,), (0.25,), tmp_path / "v.png")
    assert (shown(saved[0].axes[1]) == 1).all()


def grey(i):
    return np.random.default_rng(i).integers(256, size=(10, 10, 1), dtype=np.uint8)


def a_sheet(tmp_path, saved, labels, sources, rows=3, columns=4):
    z = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    out = neighbour_sheet(grey, z, labels, ["red", "blue"], sources, tmp_path / "n.png", rows, columns, seed=0)
    check_png(out, rows, columns + 1)
    return z, np.array(saved[0].axes).reshape(rows, -1)


def find(ax):
    (index,) = [i for i in range(20) if np.array_equal(shown(ax), grey(i))]
    return index


def test_neighbour_sheet_shows_the_nearest_of_other_sources(tmp_path, saved):
    labels, sources = torch.arange(20) % 2, torch.arange(20) // 2
    z, axes = a_sheet(tmp_path, saved, labels, sources)
    right = 0
    for row in axes:
        query = find(row[0])
        assert row[0].get_xlabel() == ["red", "blue"][query % 2]
        order = [j for j in (-(z @ z[query])).argsort().tolist() if sources[j] != sources[query]]
        assert [find(ax) for ax in row[1:]] == order[:4]
        for ax, j in zip(row[1:], order, strict=False):
            same = j % 2 == query % 2
            right += same
            caption = f"✓ {z[j] @ z[query]:.2f}" if same else f"✗ {z[j] @ z[query]:.2f} {['red', 'blue'][j % 2]}"
            assert ax.get_xlabel() == caption
    assert f"{right / 12:.0%} of 12 labelled pairs" in saved[0].get_suptitle()


def test_neighbour_sheet_draws_queries_from_every_class(tmp_path, saved):
    labels = torch.zeros(20, dtype=torch.int64)
    labels[13] = 1
    _, axes = a_sheet(tmp_path, saved, labels, torch.arange(20))
    assert [ax.get_xlabel() for ax in axes[:, 0]] == ["red", "red", "blue"]


def test_neighbour_sheet_without_labels_judges_nothing(tmp_path, saved):
    _, axes = a_sheet(tmp_path, saved, torch.full((20,), -1), torch.arange(20))
    captions = [ax.get_xlabel() for ax in axes[:, 1:].flat]
    assert not [c for c in captions if c.startswith(("✓", "✗"))]
    assert "pairs" not in saved[0].get_suptitle()


def test_neighbour_sheet_leaves_gaps_where_no_other_source_is_left(tmp_path, saved):
    sources = torch.zeros(20, dtype=torch.int64)
    sources[:2] = 1
    _, axes = a_sheet(tmp_path, saved, sources, sources, rows=2, columns=4)
    assert [sum(not ax.images for ax in row) for row in axes] == [2, 0]
