import numpy as np
import pytest
import torch
from matplotlib._pylab_helpers import Gcf
from PIL import Image

from sslcells.evaluation import pictures
from sslcells.evaluation.pictures import confusion, curves, embedding_map

NAMES = ["lymphocyte", "mono$cyte$", "a class whose name is far too long to be shown"]


def check_png(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 300
        assert len(image.convert("RGB").getcolors(maxcolors=image.width * image.height)) > 20


def a_run(knn=True, health=True):
    rows = [{"step": i, "loss": 5 / (1 + i / 50), "lr": 1e-3, "epoch": i / 9} for i in range(0, 300, 5)]
    for step in (0, 100, 200):
        if knn:
            rows.append({"step": step, "knn/top1": 0.5 + step / 500, "knn/balanced": 0.4 + step / 500})
        if health:
            rows.append({"step": step, "health/effective_rank": 9.0 + step, "health/row_std": 0.7})
    return rows


@pytest.fixture
def saved(monkeypatch):
    """The figures that were saved, to look into."""
    figures, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, out: figures.append(figure) or save(figure, out))
    return figures


@pytest.mark.parametrize(
    ("knn", "health", "panels"), [(True, True, 5), (True, False, 3), (False, True, 4), (False, False, 2)]
)
def test_curves_have_a_panel_for_each_figure_there_is(tmp_path, saved, knn, health, panels):
    out = curves(a_run(knn, health), tmp_path / "new" / "curves.png")
    check_png(out)
    assert len(saved[0].axes) == panels


def test_curves_show_the_untrained_encoder_dashed(tmp_path, saved):
    curves(a_run(), tmp_path / "curves.png")
    (ax,) = [ax for ax in saved[0].axes if "Accuracy" in ax.get_title()]
    dashed = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert sorted(dashed) == [0.4, 0.5]


def test_curves_without_step_0_claim_nothing_about_the_untrained_encoder(tmp_path, saved):
    curves([row for row in a_run() if row["step"]], tmp_path / "curves.png")
    assert not [line for ax in saved[0].axes for line in ax.lines if line.get_linestyle() == "--"]


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path, saved):
    curves([{"step": s, "loss": v} for s, v in [(0, 3.0), (1, 2.0), (2, 9.0), (2, 1.0), (3, 0.5)]], tmp_path / "c.png")
    assert saved[0].axes[0].lines[0].get_ydata().tolist() == [3, 2, 1, 0.5]


def test_nothing_to_plot_is_no_file(tmp_path):
    assert curves([{"step": 3, "epoch": 1.0}], tmp_path / "c.png") is None
    assert confusion(torch.tensor([-1, -1]), torch.tensor([0, 1]), NAMES, tmp_path / "c.png") is None
    assert embedding_map(torch.randn(4, 8), torch.zeros(4), NAMES, tmp_path / "c.png", 0, "few") is None
    assert not list(tmp_path.iterdir())


def test_embedding_map_separates_what_is_separate(tmp_path, saved):
    labels = torch.arange(90) % 3
    z = 5 * torch.eye(3, 16)[labels] + 0.3 * torch.randn(90, 16, generator=torch.Generator().manual_seed(0))
    out = embedding_map(z, labels, NAMES, tmp_path / "map.png", 0, "three classes")
    centres = torch.tensor(np.array([c.get_offsets().mean(0) for c in saved[0].axes[0].collections]))
    spread = max(c.get_offsets().std(0).max() for c in saved[0].axes[0].collections)
    assert torch.pdist(centres).min() > 2 * spread
    check_png(out)
    assert len(saved[0].axes[0].get_legend().get_texts()) == 3


def test_embedding_map_counts_unlabelled_and_many_classes(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(pictures, "_MAP_POINTS", 120)
    labels = torch.arange(500) % 50 - 1
    embedding_map(torch.randn(500, 8), labels, [f"c{i}" for i in range(49)], tmp_path / "map.png", 0, "many")
    legend = [text.get_text() for text in saved[0].axes[0].get_legend().get_texts()]
    assert len(legend) <= 42
    assert legend[0].startswith("unlabelled (")
    assert legend[1].startswith("other classes (")
    assert sum(int(text.rsplit("(", 1)[1].rstrip(")")) for text in legend) == 120
    looks = {(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in saved[0].axes[0].collections}
    assert len(looks) == len(legend)


@pytest.mark.parametrize("n", [5, 6])
def test_embedding_map_of_few_points(tmp_path, n):
    z = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    check_png(embedding_map(z, torch.zeros(n, dtype=torch.int64), NAMES, tmp_path / "map.png", 0, "few"))


def test_collapsed_rows_stay_in_one_place_and_are_called_so(tmp_path, saved):
    embedding_map(torch.ones(60, 8), torch.arange(60) % 3, NAMES, tmp_path / "map.png", 0, "collapsed")
    ax = saved[0].axes[0]
    assert "collapsed" in ax.get_title()
    assert len(np.unique(np.concatenate([c.get_offsets() for c in ax.collections]), axis=0)) == 1


def test_confusion_says_what_was_taken_for_what(tmp_path, saved):
    labels, predicted = torch.tensor([0, 0, 0, 0, 1, -1, 1]), torch.tensor([0, 0, 0, 1, 1, 1, -1])
    check_png(confusion(labels, predicted, NAMES, tmp_path / "confusion.png"))
    ax = saved[0].axes[0]
    assert ax.images[0].get_array().tolist() == [[0.75, 0.25, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 0]]
    assert {text.get_text() for text in ax.texts} == {"75%\n3", "25%\n1", "50%\n1"}
    assert [t.get_text() for t in ax.get_xticklabels()][-1] == "no neighbour"
    assert "66.7% right, 62.5% balanced" in ax.get_title()


def test_no_figure_is_registered_with_pyplot(tmp_path):
    confusion(torch.tensor([0, 1]), torch.tensor([0, 1]), NAMES, tmp_path / "c.png")
    assert Gcf.get_all_fig_managers() == []
