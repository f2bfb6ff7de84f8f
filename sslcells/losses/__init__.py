"""The losses over the global batch, for this framework's loop and for anyone's own."""

from sslcells.losses.contrastive import DCLLoss, HardNegativeLoss, NTXentLoss, SupConLoss
from sslcells.losses.pairs import BatchAllTripletLoss, PairLoss
from sslcells.losses.triplet import BatchHardTripletLoss
from sslcells.losses.whole import whole_ids, whole_rows

__all__ = [
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "DCLLoss",
    "HardNegativeLoss",
    "NTXentLoss",
    "PairLoss",
    "SupConLoss",
    "whole_ids",
    "whole_rows",
]
