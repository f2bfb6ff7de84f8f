"""The XML of OME-TIFF."""

from typing import Any
from xml.etree import ElementTree


def parsed(text: str | None) -> Any:
    """The root element.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return ElementTree.fromstring(text or "")
    except ElementTree.ParseError as error:
        raise ValueError(f"its OME metadata cannot be read: {error}") from None


def tag(element: Any) -> str:
    """The name of an element without its namespace."""
    return str(element.tag).rpartition("}")[2]


def pixels(text: str | None) -> list[Any]:
    """The element `Pixels` of each image, in their order.

    Raises:
        ValueError: as `parsed`.
    """
    return [element for element in parsed(text).iter() if tag(element) == "Pixels"]
