"""Local views in a method's section: small crops of each image beside its full-size views."""

from typing import Self

from pydantic import Field, model_validator

from sslcells import methods
from sslcells.config import Section


class LocalViews(Section):
    """How many local views an image has, and which part of it they show."""

    local_views: int = Field(0, ge=0)
    """Small crops of each image; a part of a single cell seldom shows what the whole is, so there are none."""
    local_size: int = Field(24, ge=8)
    """Height and width of a local view, in pixels."""
    local_min_scale: float = Field(0.05, gt=0, le=1)
    """Smallest local crop, as a fraction of the image's area."""
    local_max_scale: float = Field(0.4, gt=0, le=1)
    """Largest local crop, as a fraction of the image's area; augment.min_scale is the smallest full-size crop."""

    @model_validator(mode="after")
    def _scales(self) -> Self:
        low, high = self.local_min_scale, self.local_max_scale
        if low > high:
            raise ValueError(f"local_min_scale={low} is above local_max_scale={high}")
        return self

    @property
    def local(self) -> methods.Local | None:
        """The local views, or None where there are none."""
        scale = self.local_min_scale, self.local_max_scale
        return methods.Local(self.local_views, self.local_size, scale) if self.local_views else None
