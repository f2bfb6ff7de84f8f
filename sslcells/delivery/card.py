"""The model card: training data, recipe, figures, limits, and how to load the encoder."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sslcells import __version__, values
from sslcells.config import Run, load
from sslcells.data.holdout import held_out_by
from sslcells.delivery.encoder import Encoder, sides
from sslcells.evaluation.lab_tables import lab_tables
from sslcells.evaluation.tables import Table
from sslcells.inputs import summary
from sslcells.names import CONFIG, EVALUATION
from sslcells.run.metrics import METRICS, read_metrics

_MOST = 60
"""Figures in one table."""


def card(
    folder: Path,
    encoder: Encoder,
    spec: Mapping[str, Any],
    checks: Sequence[str],
    forms: Collection[str],
    lab: str | None = None,
) -> str:
    """The card of a run's encoder, in Markdown; where the folder lacks information, the card says "Not known".

    `forms` are the files in other formats than timm's: encoder.pt2, encoder.onnx; for images of `lab` if it is given.
    """
    config = folder / CONFIG
    run = load(str(config)) if config.is_file() else None
    parts = [
        _head(encoder, spec, run),
        "## Data\n\n" + _data(run),
        "## Recipe\n\n" + _recipe(run),
        "## Figures\n\n" + _figures(folder, run),
        "## Limits\n\n" + _limits(encoder, run),
        "## How to load it\n\n" + _loading(encoder, spec, forms, lab),
        "## Checked\n\nAgainst the network it was exported from, in float32 on the CPU:\n\n"
        + "\n".join(f"- {line}" for line in checks),
    ]
    return "\n\n".join(parts) + "\n"


def _head(encoder: Encoder, spec: Mapping[str, Any], run: Run | None) -> str:
    name = run.name if run is not None else "encoder"
    parameters = sum(p.numel() for p in encoder.backbone.parameters()) / 1e6
    colours = {1: "grey", 3: "RGB"}.get(encoder.channels, f"{encoder.channels}-channel")
    stem = ", small stem" if spec["stem"] == "small" else ""
    return (
        "---\nlibrary_name: timm\ntags:\n- image-feature-extraction\n- microscopy\n- self-supervised-learning\n---\n\n"
        f"# {name}\n\n"
        f"An encoder of cell images: {colours} images of {encoder.size}×{encoder.size} px → {encoder.features} "
        f"features. `{spec['timm']['model_name']}`{stem}, {parameters:.2f} M parameters, digest `{encoder.digest}`. "
        f"Made with sslcells {__version__}, timm {spec['timm_version']}."
    )


def _data(run: Run | None) -> str:
    if run is None:
        return "Not known: the encoder's folder held no config.yaml."
    return f"Folders and files are given by name only.\n\n{_yaml(_unpathed(run.model_dump(mode='json')['data']))}"


def _recipe(run: Run | None) -> str:
    if run is None:
        return "Not known: the encoder's folder held no config.yaml."
    kept = ("seed", "method", "standardise", "augment", "model", "optim", "train")
    tree = run.model_dump(mode="json")
    return _yaml({key: tree[key] for key in kept})


def _figures(folder: Path, run: Run | None) -> str:
    parts = []
    if (folder / METRICS).is_file():
        rows = read_metrics(folder)
        measured = sorted({key for row in rows for key in row if "/" in key or key == "loss"})
        lines = [f"| {key} | {_number(_at(rows, key, 0))} | {_number(_last(rows, key))} |" for key in measured]
        steps = max((row["step"] for row in rows), default=0)
        parts.append(f"| figure | before training | after step {steps} |\n|---|---|---|\n" + "\n".join(lines))
        held = len(held_out_by(folder))
        queries = f"{held} images of train that were held out" if held else "the val split"
        if run is not None and any(key.startswith("knn") for key in measured):
            parts.append(
                f"knn: {run.evaluate.k} neighbours, weighted, unit rows, same source left out. `knn`: {queries}, with "
                f"neighbours in what was trained on; `knn_loo`: train in itself. `evaluation/test`: the test split."
                f"{_bounded(run)}"
            )
    if (folder / EVALUATION).is_file():
        result = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        across = result.pop("labs", None)
        found = list(_flat(result))
        lines = [f"| {key} | {_number(value)} |" for key, value in found[:_MOST]]
        more = f"\n\n{len(found) - _MOST} more are in {EVALUATION}." if len(found) > _MOST else ""
        parts.append(f"From {EVALUATION}:\n\n| figure | value |\n|---|---|\n" + "\n".join(lines) + more)
        parts += [f"Left out: {sentence}." for sentence in result.get("left out", ())]
        parts += [f"Beside a frozen encoder: {one['finding']['text']}." for one in result.get("against", ())]
        if across:
            said = "\n".join(f"- {finding['text']}" for finding in across["findings"])
            tables = [_table(table) for table in lab_tables(across)]
            parts.append("\n\n".join(["### Across laboratories", said, *tables]))
    return "\n\n".join(parts) or "No figures were found beside the encoder: its quality is not known."


def _bounded(run: Run) -> str:
    """A sentence on the images that the figures during training use, where the run bounds them."""
    bounds = [(run.evaluate.queries, "asks"), (run.evaluate.bank, "searches")]
    parts = [f"{does} at most {most:,} images" for most, does in bounds if most is not None]
    return f" Training {' and '.join(parts)}, drawn by class." if parts else ""


def _table(table: Table) -> str:
    """A table in Markdown, with its title and caption."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"{table.title}:\n\n{body}\n\n{table.caption}."


def _limits(encoder: Encoder, run: Run | None) -> str:
    lines = [
        "For research only: it has not been validated for diagnosis.",
        "The figures hold for images like those above. They say nothing about another stain, microscope, "
        "magnification or preparation: measure on your own images.",
        f"It was trained at {encoder.size}×{encoder.size} px{_scale(encoder)}; images should show the same field in µm "
        f"as in training.",
    ]
    data = run.model_dump(mode="json")["data"] if run is not None else {}
    named = data.get("sources") or data.get("source_pattern") or data.get("kind") == "table"  # a table's by their names
    if run is not None and not named:
        lines.append(
            "Sources (slide, donor, photograph) of the images were not given: if images of one source are in two "
            "splits, the figures are too high."
        )
    if data.get("kind") == "synthetic":
        lines.append("It was trained on drawn cells, not real ones: use it to try the software only.")
    taught = run.model_dump(mode="json")["method"].get("teacher") if run is not None else None
    if taught is not None:
        name = str(taught["weights"]).rpartition("/")[2]
        lines.append(f"It learned from another encoder's features, `{name}`; that one's licence may apply too.")
    if run is not None and run.model.start is not None:
        start = run.model.start.rpartition("/")[2]
        lines.append(f"Training started from published weights, `{start}`; their licence applies too.")
    return "\n".join(f"- {line}" for line in lines)


def _scale(encoder: Encoder) -> str:
    um = encoder.reading.get("um_per_pixel")
    return "" if um is None else f" from images at {um:g} µm per pixel, to which files that say their scale are brought"


def _loading(encoder: Encoder, spec: Mapping[str, Any], forms: Collection[str], lab: str | None) -> str:
    height, width = sides(encoder)
    shape = f"(N, {encoder.channels}, {height}, {width})"
    included, also, of, whose = "normalisation is included", "resizing and normalisation", "", ""
    if encoder.standard is not None:
        included, also = "standardisation, resizing and normalisation are included", "all of it"
        of = f" of the laboratory {lab}" if lab is not None else ""
        whose = ', lab="NAME"' if encoder.by_lab else ""
    if spec["stem"] == "small":
        alone = (
            "timm has no argument for the small stem: after `timm.create_model`, two modules are replaced (`conv1` by "
            "a 3×3 convolution of stride 1, `maxpool` by nothing), then the weights fit. `load.py` does it:\n\n"
        )
    elif spec["timm"]["model_name"] == "small_cnn":
        alone = "The network is not one of timm's: `small_cnn.py` registers it with timm; `load.py` imports it:\n\n"
    else:
        arguments = ", ".join(f"{key}={value!r}" for key, value in spec["timm"].items())
        alone = (
            f"With timm alone, for images normalised by the mean and std in `encoder.json`; the name "
            f"`local-dir:FOLDER` with `pretrained=True` gives the same network:\n\n"
            f"```python\nimport timm\n\n"
            f'encoder = timm.create_model({arguments}, checkpoint_path="encoder.safetensors").eval()\n```\n\n'
            f"`load.py` includes {also}, and needs timm alone too:\n\n"
        )
    parts = [
        *_standardised(encoder),
        f"{alone}```python\nfrom load import load, prepare\n\nfeatures = load()(prepare(pixels{whose}))  "
        f"# pixels (N, {encoder.channels}, H, W) uint8 → (N, {encoder.features})\n```",
        *(
            [
                f"With torch alone, for pixels {shape} uint8{of}; {included}:\n\n```python\nimport torch\n\n"
                f'encoder = torch.export.load("encoder.pt2").module()\n```'
            ]
            if "encoder.pt2" in forms
            else []
        ),
        *(
            [
                f"With ONNX, for pixels {shape} uint8{of}; {included}:\n\n```python\nimport onnxruntime\n\n"
                f'session = onnxruntime.InferenceSession("encoder.onnx")\n'
                f'(features,) = session.run(None, {{"pixels": pixels}})\n```'
            ]
            if "encoder.onnx" in forms
            else []
        ),
        "With sslcells, for folders, files, PIL images and tensors of any size:\n\n```python\nimport sslcells\n\n"
        f'vectors = sslcells.embed("path/to/cells", "path/to/this/folder"{whose})\n```',
    ]
    return "\n\n".join(parts)


def _standardised(encoder: Encoder) -> list[str]:
    """That images are standardised first, and what does not do it; empty if they are taken as they are."""
    if encoder.standard is None:
        return []
    lines = [
        f"The encoder takes **standardised** images ({summary(encoder.standard).removeprefix('input: ')}). `load.py` "
        f"(`prepare`), the programs below and sslcells do this. timm's network alone, `model.safetensors` and "
        f"`encoder.safetensors`, does not: raw images give wrong features there. Give it what `prepare` returns."
    ]
    if encoder.by_lab:
        known = ", ".join(encoder.standard.spec.get("labs") or ()) or "none"
        lines.append(
            f"Images are standardised by laboratory. Known by name: {known}. A new one is measured once, on about a "
            f"hundred of its images without labels: `row = laboratory(pixels)` of `load.py`, then "
            f"`prepare(pixels, lab=row)`; `sslcells.embed` of a folder does it by itself."
        )
    return lines


def _yaml(tree: Mapping[str, Any]) -> str:
    return f"```yaml\n{values.write(tree)}```"


def _unpathed(data: dict[str, Any]) -> dict[str, Any]:
    """The data section with only the last part of each path: the rest would reveal the machine it was trained on."""
    shortened = {key: Path(data[key]).name for key in ("path", "sources", "root", "table") if data.get(key)}
    return {key: value for key, value in (data | shortened).items() if value is not None}


def _at(rows: Sequence[Mapping[str, Any]], key: str, step: int) -> Any:
    return next((row[key] for row in rows if row["step"] == step and key in row), None)


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((row[key] for row in reversed(rows) if key in row and row["step"] > 0), None)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(tree: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested mappings, as a/b/c."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{name}/{key}" if name else str(key))
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield name, tree
