"""What is done with a trained encoder: called from Python, exported, run over folders of images, searched with."""

from sslcells.errors import UserError


class DeliveryError(UserError):
    """What was asked for cannot be handed over as it should be; the message says why."""
