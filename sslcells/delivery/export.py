"""`sslcells export`: an encoder as a folder to share, in several forms, each checked against the original network."""

import inspect
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells import models
from sslcells.augment import resized
from sslcells.config import ConfigError, extra, nearest
from sslcells.data import synthetic
from sslcells.data._names import some
from sslcells.delivery import DeliveryError, hub, standalone
from sslcells.delivery.card import card
from sslcells.delivery.encoder import Encoder, find_run, load_encoder, sides
from sslcells.models import files
from sslcells.standardise import cell, standard
from sslcells.storage import json_text
from sslcells.values import place

ONNX, PROGRAM = "encoder.onnx", "encoder.pt2"
HUB = "config.json", "model.safetensors"
"""As the Hugging Face hub has them, for timm.create_model("local-dir:FOLDER", pretrained=True)."""
TOLERANCE = 1e-3
"""Largest difference allowed, relative to the largest feature, in float32; another order of sums gives about 1e-6."""


class NotMade(DeliveryError):
    """The backbone cannot be exported in this form."""


class Check(NamedTuple):
    """How far one form of the encoder is from the network."""

    what: str
    difference: float
    """largest absolute difference of any feature"""
    largest: float
    """largest absolute feature"""

    def __str__(self) -> str:
        return f"{self.what}: largest difference {self.difference:.2e}, features up to {self.largest:.3g}"


class FromPixels(nn.Module):
    """(N, C, H, W) uint8 → (N, F) float32: the preparation is part of the network, so that nobody can forget it.

    H and W are S, the encoder's size; where it standardises, the size that files are read at: see `sides`. `lab` (P,)
    stands for the images of one laboratory, if it standardises by laboratory.
    """

    mean: Tensor
    std: Tensor

    lab: Tensor | None

    def __init__(self, encoder: Encoder, lab: Tensor | None = None) -> None:
        super().__init__()
        self.backbone, self.standard = encoder.backbone, encoder.standard
        self._size, self._whole = encoder.size, encoder._whole
        self.register_buffer("mean", encoder.mean.clone())
        self.register_buffer("std", encoder.std.clone())
        self.register_buffer("lab", lab)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) uint8 → (N, F)."""
        x = pixels.float() / 255
        if self.standard is not None:
            rows = None if self.lab is None else self.lab.expand(x.shape[0], -1)
            x = resized(self.standard(x, rows), self._size, *self._whole)
        out: Tensor = self.backbone((x - self.mean) / self.std)
        return out


def export(
    run: str | os.PathLike[str],
    to: str | os.PathLike[str] | None = None,
    onnx: bool | None = None,
    say: Callable[[str], None] = print,
    lab: str | None = None,
) -> Path:
    """Write a run's encoder to a folder to share, RUN/export unless `to` names another, and return the folder.

    encoder.safetensors and encoder.json (timm), model.safetensors and config.json (timm's `local-dir:` and hub),
    load.py (what timm has no argument for), standard.py and cell.py if
    images are standardised, encoder.pt2 (torch.export), encoder.onnx, README.md (the model card). Files are written
    atomically. A form that cannot be made is left out with a message that says what would help. ONNX is required if
    `onnx` is true, and left out if it is false. If the encoder standardises by laboratory, the programs are made for
    images of the laboratory `lab`, and left out without it.

    Raises:
        ConfigError: if there is no such run, or no such laboratory.
        DeliveryError: if a form gives other features than the network, or `onnx` is true and ONNX cannot be made.
    """
    folder = find_run(run)
    encoder = load_encoder(folder)
    _check_lab(encoder, run, lab, onnx)
    missing = "" if onnx is False else _not_installed()
    if onnx and missing:
        raise DeliveryError(f"--onnx: {missing}")
    out = place(to) if to is not None else folder / "export"
    if os.path.realpath(out) == os.path.realpath(folder):
        raise ConfigError(f"--to {to} is the run's own folder; choose another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as partial:
            left_out = _write(encoder, folder, Path(partial), onnx, missing, say, lab)
            for name in (PROGRAM, ONNX, *HUB):  # of an earlier export, perhaps of other weights
                (out / name).unlink(missing_ok=True)
            for file in sorted(Path(partial).iterdir()):
                os.replace(file, out / file.name)
    except OSError as error:
        raise ConfigError(f"--to {out}: cannot be written: {error}") from None
    say(f"{out}: {', '.join(sorted(file.name for file in out.iterdir()))}")
    for reason in left_out:
        say(f"left out: {reason}")
    return out


def _check_lab(encoder: Encoder, run: str | os.PathLike[str], lab: str | None, onnx: bool | None) -> None:
    """Raise a ConfigError if `lab` is none of the encoder's, or ONNX is required without one."""
    if not encoder.by_lab:
        if lab is not None:
            raise ConfigError(f"--lab {lab}: the encoder of {run} takes each image by itself (standardise.by=image)")
        return
    known = _known_labs(encoder)
    if lab is not None and lab not in known:
        raise ConfigError(f"--lab {lab}: the encoder of {run} knows {some(known, 12)}{nearest(lab, known)}")
    if onnx and lab is None:
        raise ConfigError(f"--onnx: {PROGRAM_OF_LAB.format(some(known, 12))}")


def _known_labs(encoder: Encoder) -> list[str]:
    return [] if encoder.standard is None else [*(encoder.standard.spec.get("labs") or ())]


PROGRAM_OF_LAB = "the encoder standardises by laboratory, and a program is for one: --lab one of {}; load.py takes any"


def _not_installed() -> str:
    """Which package ONNX needs that is not installed, and how to install it; empty if none."""
    try:
        extra("onnxscript", "export", f"{ONNX} (ONNX)")
        extra("onnxruntime", "export", f"{ONNX} (ONNX)")
    except ConfigError as error:
        return str(error)
    return ""


def _write(
    encoder: Encoder,
    folder: Path,
    out: Path,
    onnx: bool | None,
    missing: str,
    say: Callable[[str], None],
    lab: str | None,
) -> list[str]:
    """Write the files; returns which forms were left out, and why. `missing` is what `_not_installed` returned."""
    spec = json.loads((folder / files.SPEC).read_text(encoding="utf-8")) | {"reading": encoder.reading}
    (out / files.SPEC).write_text(json_text(spec, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(folder / files.WEIGHTS, out / files.WEIGHTS)
    shutil.copyfile(standalone.__file__, out / "load.py")
    if encoder.standard is not None:
        _write_standard(out)
    if spec["timm"]["model_name"] == "small_cnn":
        (out / "small_cnn.py").write_text(inspect.getsource(models.small_cnn), encoding="utf-8")
    known = _known_labs(encoder) if encoder.by_lab else []
    checked_on = lab or next(iter(known), None)
    row = encoder.standard.row(checked_on) if encoder.standard is not None and checked_on is not None else None
    network = FromPixels(encoder, row).eval()
    inputs = {"noise": noise(encoder, 3), "one image of noise": noise(encoder, 1), "drawn cells": drawn(encoder, 8)}
    alone = quietly(lambda x: standalone.load(out)(standalone.prepare(x, out, row)))
    checks = [compare("timm", alone, network, inputs, say)]
    forms, left_out = list[str](), [missing] if missing else []
    if (reason := hub.write(encoder.backbone, spec, out)) is None:
        forms.append(HUB[0])
        checks.append(compare("timm local-dir", hub.network(out, encoder, row), network, inputs, say))
    else:
        left_out.insert(0, reason)
    try:
        if encoder.by_lab and lab is None:
            raise NotMade(f"{PROGRAM} and {ONNX}: {PROGRAM_OF_LAB.format(some(known, 12))}")
        program = write_program(network, encoder, out / PROGRAM)
        forms.append(PROGRAM)
        loaded = torch.export.load(out / PROGRAM).module()
        checks.append(compare("torch.export", loaded, network, inputs, say))
        if onnx is not False and not missing:
            write_onnx(portable(network, encoder, program), out / ONNX)
            forms.append(ONNX)
            checks.append(compare("ONNX", onnx_session(out / ONNX), network, inputs, say))
    except NotMade as error:
        if onnx:
            raise
        left_out.append(str(error))
    (out / "README.md").write_text(card(folder, encoder, spec, [str(c) for c in checks], forms, lab), encoding="utf-8")
    return left_out


def quietly(prepare: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same without warnings: in noise there is no cell to be found."""

    def same(pixels: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return prepare(pixels)

    return same


def _write_standard(out: Path) -> None:
    """The two modules that standardise images, to be imported without sslcells."""
    for module in (cell, standard):
        text = inspect.getsource(module).replace("from sslcells.standardise.cell import", "from cell import")
        (out / f"{module.__name__.rpartition('.')[2]}.py").write_text(text, encoding="utf-8")


def noise(encoder: Encoder, count: int) -> Tensor:
    """(count, C, H, W) uint8, of the size that the exported programs take."""
    shape = count, encoder.channels, *sides(encoder)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def drawn(encoder: Encoder, count: int) -> Tensor:
    """(count, C, H, W) uint8: drawn cells, in grey if the encoder does not take RGB."""
    side = min(max(encoder.size, 16), 1024)
    cells = synthetic.open_splits(synthetic.Config(size=side, train=count))["train"]
    x = torch.stack([cells.pixels(i) for i in range(count)]).float() / 255
    if encoder.channels != 3:
        x = x.mean(1, keepdim=True).expand(-1, encoder.channels, -1, -1)
    x = F.interpolate(x, sides(encoder), mode="bilinear", antialias=True, align_corners=False)
    return (x * 255).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def compare(
    what: str,
    other: Callable[[Tensor], Tensor],
    network: nn.Module,
    inputs: dict[str, Tensor],
    say: Callable[[str], None] = print,
) -> Check:
    """The largest difference between `other` and the network over the inputs; each is reported with `say`.

    Raises:
        DeliveryError: if the difference is above TOLERANCE.
    """
    worst = Check(what, 0.0, 0.0)
    for name, pixels in inputs.items():
        expected = network(pixels)
        if not expected.isfinite().all():
            raise DeliveryError(f"the encoder gives no finite features of {name}: its weights are broken")
        check = Check(what, (other(pixels) - expected).abs().max().item(), expected.abs().max().item())
        say(f"{what} on {name} {tuple(pixels.shape)}: {str(check).partition(': ')[2]}")
        if not check.difference <= TOLERANCE * max(check.largest, 1e-6):  # also if it is NaN
            raise DeliveryError(f"{check}: not the same encoder, on {name}")
        worst = max(worst, check, key=lambda c: c[1:])
    return worst


def write_program(network: nn.Module, encoder: Encoder, file: Path) -> torch.export.ExportedProgram:
    """Write the network as a torch.export program for any number of images.

    Raises:
        NotMade: if torch.export cannot trace it.
    """
    try:
        program = _traced(network, encoder)
        torch.export.save(program, file)
    except Exception as error:  # whatever a backbone does that cannot be traced
        file.unlink(missing_ok=True)
        raise NotMade(
            f"{PROGRAM} and {ONNX}: torch.export cannot follow this backbone, {_first(error)}; load.py and timm can"
        ) from error
    return program


def _traced(network: nn.Module, encoder: Encoder) -> torch.export.ExportedProgram:
    images = torch.export.Dim("images")
    with torch.no_grad():
        return torch.export.export(network, (noise(encoder, 2),), dynamic_shapes={"pixels": {0: images}})


def portable(
    network: FromPixels, encoder: Encoder, program: torch.export.ExportedProgram
) -> torch.export.ExportedProgram:
    """The network's program in operations that ONNX has; masks of cells do not grow as bits there."""
    if network.standard is None or not network.standard.needs_cell:
        return program
    network.standard.bits = False
    try:
        return _traced(network, encoder)
    except Exception as error:  # as above
        raise NotMade(f"{ONNX}: torch.export cannot follow this backbone, {_first(error)}") from error
    finally:
        network.standard.bits = True


def write_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    """Write the program as ONNX.

    Raises:
        NotMade: if it uses an operator that ONNX lacks.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from the exporter's own libraries
            made = torch.onnx.export(program, input_names=["pixels"], output_names=["features"], verbose=False)
        assert made is not None
        made.save(str(file))
    except Exception as error:  # as above
        file.unlink(missing_ok=True)
        raise NotMade(
            f"{ONNX}: the encoder, with what standardises its input, cannot be written as ONNX: {_lacking(error)}; "
            f"{PROGRAM} and load.py have it"
        ) from error


def onnx_session(file: Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function on the CPU: (N, C, S, S) uint8 → (N, F)."""
    runtime = extra("onnxruntime", "export", "ONNX")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def _lacking(error: Exception) -> str:
    """The operation that ONNX lacks, or else how the error begins."""
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
    return f"it has no {found[1]}" if found else _first(error)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
