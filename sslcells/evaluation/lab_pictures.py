"""Pictures of the cross-laboratory report: maps by class and by laboratory side by side, and confusions."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sslcells.evaluation.across import Across, predicted_from
from sslcells.evaluation.gallery import Picture
from sslcells.evaluation.pictures import Map, confusion, save, scatter, short, tsne_map


def draw(across: Across, classes: Sequence[str], folder: Path, seed: int) -> list[Picture]:
    """Draw the maps and the confusion of each laboratory into `folder`."""
    assert across.result is not None
    out = []
    place = tsne_map(across.pool.z, seed)
    if place is not None:
        path = _maps(across, place, classes, folder / "labs.png")
        caption = (
            "The same map twice. If colours lie together on the left and mix on the right, the encoder sees cells; if "
            "they lie together on the right, it sees laboratories."
        )
        out.append(Picture("Map by class and by laboratory", path, caption))
    for number, lab in enumerate(across.result["labs"]):
        if "confusion" in lab:
            labels, predicted = predicted_from(lab["confusion"], classes)
            who = f"{lab['lab']} by the others' labels, linear probe"
            drawn = confusion(labels, predicted, classes, folder / f"labs_confusion_{number}.png", short(who, 60))
            if drawn is not None:
                out.append(Picture(f"Confusion: {who}", drawn, "Share of each true class predicted as each class."))
    return out


def _maps(across: Across, place: Map, classes: Sequence[str], out: Path) -> Path:
    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 2)
    numbers = sorted(across.names)
    labs = across.pool.labs - 1
    columns = 0
    for ax, groups, names, others, title in (
        (axes[0], across.pool.labels, classes, "other classes", "by class"),
        (axes[1], labs, [across.names[n] for n in numbers], "other laboratories", "by laboratory"),
    ):
        columns += scatter(ax, place.place, groups[place.chosen].numpy(), names, others)
        ax.set(xlabel=f"{place.name} 1 (no unit)", ylabel=f"{place.name} 2 (no unit)", xticks=[], yticks=[])
        ax.set_aspect("equal", adjustable="datalim")
        ax.set_box_aspect(1)
        ax.set_title(title, fontsize="medium")
    figure.set_size_inches(10 + 2.6 * columns, 5.6)
    figure.suptitle(f"{len(place.chosen):,} of {place.rows:,} images; {place.how}", fontsize="medium")
    return save(figure, out)
