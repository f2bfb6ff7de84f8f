"""What is done with a trained encoder: called from Python, exported, run over folders of images, searched with."""


class DeliveryError(Exception):
    """What was asked for cannot be handed over as it should be; the message says why."""
