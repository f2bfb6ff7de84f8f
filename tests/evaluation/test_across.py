"""The cross-laboratory report on planted laboratories, and against scikit-learn where it has the figure."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from sslcells.config import Evaluate, Standardise
from sslcells.data._smear import draw_smear
from sslcells.evaluation.across import UNNAMED, Across, predicted_from
from sslcells.evaluation.lab_pictures import draw
from sslcells.evaluation.lab_tables import lab_tables
from sslcells.evaluation.labs import drawn
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.robustness import Rows
from sslcells.evaluation.ways import VOTE
from sslcells.standardise import Standard, fit

CLASSES = ("eosinophil", "lymphocyte")
QUICK = Evaluate(bootstrap=100, k=5)


def split_of(z, labels, labs=None, sources=None, first=0):
    number = torch.arange(len(z)) + first
    digest = torch.stack([number, number], 1)
    labs = None if labs is None else torch.as_tensor(labs)
    sources = number if sources is None else sources
    return SplitFeatures(digest, torch.zeros(len(z), 1), z, torch.as_tensor(labels), sources, [*map(str, number)], labs)


def across(by_split, names=("here", "there"), new=None, classes=CLASSES, config=QUICK):
    asked = "test" if "test" in by_split else "train"
    return Across(by_split, asked, names, new or {}, classes, config, seed=0)


def cells(each: int, tint: tuple[float, float, float]) -> tuple[Tensor, list[int], list[int]]:
    """Drawn cells (N, 3, H, W) of two laboratories that differ in tint alone, with class and laboratory."""
    pixels, labels, labs = [], [], []
    for lab in (1, 2):
        for label, drawn_class in enumerate((1, 3)):
            for i in range(each):
                drawn = draw_smear(9, 1000 * lab + i, drawn_class, 32)
                x = torch.tensor(drawn).permute(2, 0, 1) * torch.tensor(tint if lab == 2 else (1, 1, 1))[:, None, None]
                pixels.append(x.round())
                labels.append(label)
                labs.append(lab)
    return torch.stack(pixels), labels, labs


def density(pixels: Tensor) -> Tensor:
    """Features: quantiles of the optical density of each channel around the middle."""
    middle = -((pixels + 1) / 256).log()[:, :, 8:24, 8:24].flatten(2)
    z = torch.quantile(middle, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), dim=2).permute(1, 2, 0).flatten(1)
    return z - z.mean(0)


@pytest.mark.parametrize("by", ["image", "lab"])
def test_drawn_cells_that_differ_in_tint_alone(by):
    pixels, labels, labs = cells(40, (1.0, 0.6, 0.8))
    before = across({"train": split_of(density(pixels), labels, labs)}).result["pairs"][0]
    assert before["robustness index"]["value"] < 0.5
    assert before["lab predictability"]["value"] > 0.95
    x = pixels / 255
    parts = {name: [x[torch.tensor(labs) == number]] for number, name in enumerate(("here", "there"), 1)}
    standard = Standard(fit(Standardise(colour="background", by=by), x, parts))
    rows = torch.stack([standard.row(("here", "there")[lab - 1]) for lab in labs]) if by == "lab" else None
    after = across({"train": split_of(density(standard(x, rows) * 255), labels, labs)}).result["pairs"][0]
    assert after["robustness index"]["value"] > 0.9
    told = after["lab predictability"]
    assert told["null low"] <= told["value"] <= told["null high"]


def planted(count=80, tint=0.0, seed=0, classes=2, noise=0.2):
    g = torch.Generator().manual_seed(seed)
    labels, labs = torch.arange(count) % classes, torch.arange(count) // classes % 2 + 1
    z = torch.cat([F.one_hot(labels, classes).float(), tint * F.one_hot(labs - 1, 2).float()], 1)
    return z + noise * torch.randn(z.shape, generator=g), labels, labs


def figure(lab, method, labels_of="the others", among="all classes"):
    wanted = {"labels of": labels_of, "among": among, "unit": "image"}
    rows = [r for r in lab["figures"] if r["method"].startswith(method) and wanted.items() <= r.items()]
    assert len(rows) == 1
    return rows[0]["scores"]["balanced accuracy"]


def test_each_laboratory_is_asked_by_the_others_labels():
    z, labels, labs = planted(noise=0.8)
    by_split = {"train": split_of(z, labels, labs), "test": split_of(*planted(60, seed=1, noise=0.8), first=1000)}
    of_all = across(by_split, config=Evaluate(bootstrap=100, k=5, temperature=1e6))
    found = of_all.result
    assert [lab["lab"] for lab in found["labs"]] == ["here", "there"]
    for number, lab in enumerate(found["labs"], 1):
        test = by_split["test"]
        rest, own = labs != number, test.labs == number
        knn = KNeighborsClassifier(5, metric="cosine").fit(z[rest], labels[rest])
        want = balanced_accuracy_score(test.labels[own], knn.predict(test.z[own]))
        assert figure(lab, "kNN")["value"] == pytest.approx(want)
        means = torch.stack([F.normalize(z[rest & (labels == c)]).mean(0) for c in range(2)])
        nearest = F.cosine_similarity(test.z[own][:, None], means, dim=2).argmax(1)
        assert figure(lab, "prototypes")["value"] == pytest.approx(balanced_accuracy_score(test.labels[own], nearest))
        assert figure(lab, "linear")["value"] > 0.5
        assert figure(lab, "linear", "its own")["low"] <= figure(lab, "linear", "its own")["value"]
        assert lab["others' images"] == int(rest.sum())
        true, guess = predicted_from(lab["confusion"], CLASSES)
        assert balanced_accuracy_score(true, guess) == pytest.approx(figure(lab, "linear")["value"])
        answers = of_all.answers[lab["lab"]]
        rows = [test.names.index(image) for image in answers.images]
        assert sorted(rows) == own.nonzero()[:, 0].tolist()
        assert [CLASSES[test.labels[i]] for i in rows] == answers.classes
        assert test.sources[rows].equal(answers.sources)
        for method, said in answers.methods.items():
            assert balanced_accuracy_score(answers.classes, said) == pytest.approx(figure(lab, method)["value"])


def test_labels_of_the_laboratory_itself_are_never_used():
    z, labels, labs = planted()
    wrong = torch.where(labs == 2, 1 - labels, labels)  # the second laboratory calls each class by the other's name
    found = across({"train": split_of(z, wrong, labs)}).result
    for lab in found["labs"]:
        assert figure(lab, "kNN")["value"] < 0.1
        assert figure(lab, "linear")["value"] < 0.1
        assert figure(lab, "kNN", "its own")["value"] > 0.9
        assert figure(lab, "linear", "its own")["value"] > 0.9


def test_the_ceiling_never_learns_from_the_same_source():
    """Rows of a source are alike and classes are random: only a neighbour of the same source would know."""
    g = torch.Generator().manual_seed(0)
    sources = torch.arange(40).repeat_interleave(5)
    z = torch.randn(40, 8, generator=g)[sources] + 0.01 * torch.randn(200, 8, generator=g)
    labels = torch.randint(2, (40,), generator=g)[sources]
    found = across({"train": split_of(z, labels, sources % 2 + 1, sources)}).result
    for lab in found["labs"]:
        assert lab["sources"] == 20
        assert figure(lab, "kNN", "its own")["value"] < 0.75
        assert figure(lab, "linear", "its own")["value"] < 0.75
        assert {row["unit"] for row in lab["figures"]} == {"image", "source", VOTE}


def test_prototypes_never_hold_rows_of_the_source_that_is_asked():
    """A source's rows are alike and its class is random: only a mean with its own rows would know."""
    g = torch.Generator().manual_seed(0)
    sources = torch.arange(10).repeat_interleave(20)
    z = torch.randn(10, 64, generator=g)[sources] + 0.01 * torch.randn(200, 64, generator=g)
    labels = (torch.arange(10) % 2)[sources]
    labs = torch.arange(200) % 2 + 1  # both laboratories have half of each source
    found = across({"train": split_of(z, labels, labs, sources)}).result
    for lab in found["labs"]:
        assert figure(lab, "prototypes")["value"] < 0.75
        assert figure(lab, "linear")["value"] < 0.75
        assert {row["unit"] for row in lab["figures"]} == {"image", "source", VOTE}
        assert all(row["sources"] == 10 for row in lab["figures"])


def test_classes_under_ten_and_classes_the_others_lack_are_named():
    z, labels, labs = planted(120, classes=3)
    labels = torch.where((labs == 1) & (labels == 2), -1, labels)  # the third class is seen in one laboratory alone
    rows = ~((labels == 1) & (labs == 2) & (torch.arange(120) >= 54))
    found = across({"train": split_of(z[rows], labels[rows], labs[rows])}, classes=("a", "b", "c")).result
    there = found["labs"][1]
    assert there["by class"] == {"a": 20, "b": 9, "c": 20}
    assert (there["few"], there["without others' labels"]) == (["b"], ["c"])
    assert figure(there, "kNN")["value"] == pytest.approx(0.5, abs=0.1)  # all of a, none of c
    said = [finding["text"] for finding in found["findings"]]
    assert "there: fewer than 10 images of b: not counted" in said
    assert "there: no other laboratory has c: no classifier can name them" in said
    assert "here and there are not compared: only a has 10 images in both" in said


def test_more_classes_elsewhere_give_two_figures():
    z, labels, labs = planted(120, classes=3)
    rows = ~((labs == 2) & (labels == 2))
    found = across({"train": split_of(z[rows], labels[rows], labs[rows])}, classes=("a", "b", "c")).result
    assert figure(found["labs"][1], "kNN", among="its classes")["value"] >= figure(found["labs"][1], "kNN")["value"]
    assert {row["among"] for row in found["labs"][0]["figures"]} == {"all classes"}


def test_the_sentence_where_laboratories_come_first():
    sentence = "this encoder separates laboratories before it separates cells. here and there: neighbours tell"
    apart = across({"train": split_of(*planted(tint=1.5, noise=0.5))}).result["findings"][0]
    assert apart["warning"]
    assert apart["text"].startswith(sentence)
    together = across({"train": split_of(*planted())}).result["findings"][0]
    assert not together["warning"]
    assert together["text"].startswith("here and there: neighbours tell the laboratory in")


def test_a_new_laboratory_beside_data_that_names_none(tmp_path):
    z, labels, _ = planted(tint=0.0)
    train, test = split_of(z, labels), split_of(*planted(60, seed=2)[:2], first=1000)
    new = {"clinic": split_of(*planted(60, seed=3)[:2], first=2000)}
    report = across({"train": train, "test": test}, (), new)
    assert [lab["lab"] for lab in report.result["labs"]] == ["clinic"]
    assert report.result["pairs"][0]["labs"] == [UNNAMED, "clinic"]
    assert report.result["pairs"][0]["images of each"] == 60
    assert figure(report.result["labs"][0], "kNN")["value"] > 0.9
    assert [table.title for table in lab_tables(report.result)] == [
        "Laboratories told apart",
        "Each laboratory by the labels of the others",
        "Images of each class",
    ]
    drawn = draw(report, CLASSES, tmp_path, seed=0)
    assert [picture.path.name for picture in drawn] == ["labs.png", "labs_confusion_0.png"]
    assert all(picture.path.stat().st_size > 1000 for picture in drawn)


def test_images_that_training_saw_are_no_new_laboratory():
    z, labels, _ = planted()
    train = split_of(z, labels)
    found = across({"train": train}, (), {"clinic": split_of(z[:30], labels[:30], first=70)}).result
    assert found["findings"][0] == {
        "text": "clinic: 10 of 30 images are in train too: training has seen them",
        "warning": True,
    }


def test_nothing_to_say_about_one_laboratory():
    z, labels, labs = planted()
    assert across({"train": split_of(z, labels)}, ()).result is None
    assert across({"train": split_of(z, labels, torch.ones_like(labs))}, ("here",)).result is None


def test_a_laboratory_left_out_of_training_is_compared_with_train():
    z, labels, labs = planted()
    by_split = {
        "train": split_of(z[labs == 1], labels[labs == 1], labs[labs == 1]),
        "test": split_of(z[labs == 2], labels[labs == 2], labs[labs == 2], first=1000),
    }
    found = across(by_split).result
    assert [lab["lab"] for lab in found["labs"]] == ["there"]
    assert found["pairs"][0]["labs"] == ["here", "there"]
    assert found["robustness index"]["images"] == 80


def test_the_same_figures_at_every_call():
    by_split = {"train": split_of(*planted(noise=0.6))}
    first = across(by_split).result
    torch.manual_seed(5)
    assert across(by_split).result == first


def test_large_laboratories_are_drawn_from_and_it_is_said(monkeypatch):
    monkeypatch.setattr("sslcells.evaluation.labs.drawn", lambda rows, seed, most=10_000: drawn(rows, seed, 30))
    monkeypatch.setattr("sslcells.evaluation.labs.MOST", 30)
    train = split_of(*planted(200))
    of_all = across({"train": train})
    found = of_all.result
    for answers in of_all.answers.values():
        assert len(answers.images) == 30
        assert [CLASSES[train.labels[train.names.index(image)]] for image in answers.images] == answers.classes
    for lab in found["labs"]:
        assert lab["others' images"] == 30
        assert {row["images"] for row in lab["figures"]} == {30}
    assert "here: 140 images, drawn at random, were left out to save time" in [f["text"] for f in found["findings"]]
    rows = Rows(*(torch.arange(50) for _ in range(4)))
    assert drawn(rows, 0) is rows
    assert len(drawn(rows, 0, 20).labels.unique()) == 20
