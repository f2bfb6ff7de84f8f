"""What is done with a trained encoder: called from Python, exported, run over folders of images, searched with."""

import importlib
from types import ModuleType

from sslcells.config import ConfigError


class DeliveryError(Exception):
    """What was asked for cannot be handed over as it should be; the message says why."""


def extra(module: str, name: str, purpose: str) -> ModuleType:
    """A module of one of the package's extras.

    Raises:
        ConfigError: where it is not installed, with the command that does it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{purpose} needs {module.split('.')[0]}: pip install 'sslcells[{name}]'") from None
