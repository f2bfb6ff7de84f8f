"""`sslcells.embed`: the features of images in memory, of files, or of a folder, as one tensor."""

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sslcells.data import DataError, Decoder, Unreadable
from sslcells.data.folder import expanded, list_images
from sslcells.data.loader import Readable
from sslcells.delivery.encoder import Encoder, Lab, Pictures, finite, load_encoder
from sslcells.evaluation.encode import encode_batches, spread
from sslcells.models import eval_mode
from sslcells.standardise import AS_THEY_ARE, SAMPLE_OF_LAB
from sslcells.storage import is_file
from sslcells.values import place


def embed(
    images: str | os.PathLike[str] | Pictures | Sequence[str | os.PathLike[str]],
    encoder: Encoder | str | os.PathLike[str],
    batch: int = 64,
    lab: Lab = None,
) -> Tensor:
    """Compute the features of images: (N, F) float32 on the CPU, one row an image, in their order.

    `images` is a folder, whose images at any depth are sorted by path; a file; a list of files; or what an Encoder
    takes. `encoder` is an Encoder or a run's folder; it runs in eval mode, without gradients, on `batch` images at a
    time. `lab` is for an encoder that standardises by laboratory; without it all images are taken for those of a new
    one, and measured first. A warning says in how many images no cell was found, where the standardisation needs one.

    >>> import sslcells
    >>> vectors = sslcells.embed("cells", "runs/quickstart")
    >>> len(vectors)  # the folder "cells" holds two images
    2

    Raises:
        ConfigError: if there is no such folder, image or encoder.
        DataError: if a file cannot be read, naming it, or the encoder gives features that are not finite.
        ValueError: if tensors are not images, or have another number of channels; or if the laboratory of a single
            image is not said, and the encoder needs it.
    """
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    network, failed = encoder, list[Tensor]()
    listed = _listed(images, network)
    if network.by_lab and lab is None and len(listed):
        lab = network.laboratory([_pixels(listed[i], network) for i in spread(len(listed), SAMPLE_OF_LAB)])

    def features(part: Readable) -> Tensor:
        prepared = network.prepared(part.pixels, _of_these(lab, part.image))
        failed.append(prepared.failed)
        return network.features_of(prepared)

    with eval_mode(network):
        encoded = encode_batches(_parts(listed, network, batch), features)
        rows = [finite(z.cpu(), network) for _, z in encoded if z is not None]
    if count := sum(int(of.sum()) for of in failed):
        warnings.warn(f"no cell was found in {count} of {sum(map(len, rows))} images; {AS_THEY_ARE}", stacklevel=2)
    return torch.cat(rows) if rows else torch.zeros(0, network.features)


def _of_these(lab: Lab, index: Sequence[int]) -> Lab:
    """The laboratories of some of the images."""
    return lab[torch.tensor(index)] if isinstance(lab, Tensor) and lab.ndim == 2 else lab


def _listed(images: Any, encoder: Encoder) -> Any:
    """The images as a sequence, or as a tensor (N, C, H, W)."""
    if isinstance(images, (str, os.PathLike)):
        return _files(Path(images), encoder.decoder)
    if isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim == 3):
        return [images]
    return images


def _parts(images: Any, encoder: Encoder, batch: int) -> Iterator[Readable]:
    """The images, `batch` at a time; a file is opened when its part is read."""
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        if not isinstance(part, Tensor):
            part = [_pixels(x, encoder) for x in part]
        yield Readable(len(part), list(range(start, start + len(part))), part, [])


def _pixels(image: Any, encoder: Encoder) -> Tensor:
    """A file or an image as (C, H, W)."""
    return _opened(image, encoder.reader()) if isinstance(image, (str, os.PathLike)) else encoder.pixels(image)


def _opened(file: str | os.PathLike[str], decoder: Decoder) -> Tensor:
    try:
        return decoder(os.fspath(file))
    except Unreadable as error:
        raise DataError(f"{file}: {error}") from None


def _files(path: Path, decoder: Decoder | None) -> list[Path]:
    """The images of the path if it is a file or OME-Zarr, else the image files below it, sorted by path."""
    path = place(path)
    if is_file(path) or path.suffix.lower() == ".zarr":
        names = [path.name] if decoder is None else expanded(path.parent, [path.name], decoder)
        return [path.parent / name for name in names]
    return [path / name for name in list_images(path, decoder)]
