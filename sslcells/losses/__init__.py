"""The losses over the global batch, for this framework's loop and for anyone's own."""

from sslcells.losses.contrastive import DCLLoss, HardNegativeLoss, NTXentLoss, SupConLoss
from sslcells.losses.triplet import BatchHardTripletLoss

__all__ = ["BatchHardTripletLoss", "DCLLoss", "HardNegativeLoss", "NTXentLoss", "SupConLoss"]
