"""Uses of a trained encoder: in Python, as an export, for embedding folders of images, for search."""

from sslcells.errors import UserError


class DeliveryError(UserError):
    """An export or a folder of embeddings cannot be made; the message says why."""
