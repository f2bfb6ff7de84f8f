"""The folders and tables that docs/laboratories.md names, of drawn cells of two classes; a laboratory is a tint."""

from pathlib import Path

from PIL import Image

from sslcells.data._smear import draw_smear

CLASSES = {"eosinophil": 1, "lymphocyte": 3}


def draw(folder: Path, each: int, tint: float = 1.0, first: int = 0, copies: int = 1) -> list[Path]:
    """So many cells of each class, `copies` of each photograph."""
    files = []
    for name, drawn in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = (draw_smear(5, first + i // copies, drawn, 40) * (1.0, tint, 1.0)).astype("uint8")
            files.append(folder / name / f"{1 + i}.png")
            Image.fromarray(pixels - i % copies).save(files[-1])
    return files


def draw_laboratories(root: Path) -> None:
    """Every folder and table of the page."""
    for place, (lab, tint) in enumerate({"north": 1.0, "south": 0.6}.items()):
        draw(root / "cells" / "train" / lab, 12, tint, 100 * place)
        draw(root / "cells" / "val" / lab, 12, tint, 1000 + 100 * place)
    draw(root / "path/to/clinic", 12, 0.8, 2000)
    draw(root / "path/to/cells", 16, 1.0, 3000)
    draw(root / "my/cells", 16, 1.0, 4000)
    write_sources(root / "path/to/blood-cells")
    write_sites(root)


def write_sources(blood: Path) -> None:
    """TRAIN and TEST with three copies of each photograph, and a table that says so."""
    copied = draw(blood / "TRAIN", 24, 0.9, 5000, 3) + draw(blood / "TEST", 24, 0.9, 6000, 3)
    rows = [f"{f.relative_to(blood)},{f.parts[-3]} {f.parts[-2]} {(int(f.stem) - 1) // 3}" for f in copied]
    (blood / "sources.csv").write_text("\n".join(["path,source", *rows]))


def write_sites(root: Path) -> None:
    """cells.csv: splits, and two sites."""
    seen = draw(root / "table" / "train", 24, 1.0, 7000) + draw(root / "table" / "val", 24, 1.0, 8000)
    rows = [f"{f.relative_to(root)},{f.parts[-2]},{f.parts[-3]},{('west', 'east')[int(f.stem) % 2]}" for f in seen]
    (root / "cells.csv").write_text("\n".join(["path,label,split,site", *rows]))
