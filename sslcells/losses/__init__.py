"""The losses over the global batch, for this framework's loop and for anyone's own."""

from sslcells.losses._rows import at_least_float32, row_std, sound, unit
from sslcells.losses.contrastive import DCLLoss, HardNegativeLoss, NTXentLoss, SupConLoss
from sslcells.losses.distillation import FeatureDistillationLoss, SimilarityDistillationLoss
from sslcells.losses.gather import gather_ids, gather_with_grad
from sslcells.losses.koleo import KoLeoLoss
from sslcells.losses.lejepa import LeJEPALoss
from sslcells.losses.moco import MoCoLoss
from sslcells.losses.pairs import BatchAllTripletLoss, PairLoss
from sslcells.losses.redundancy import BarlowTwinsLoss, VICRegLoss
from sslcells.losses.sinkhorn_knopp import sinkhorn
from sslcells.losses.triplet import BatchHardTripletLoss

__all__ = [
    "BarlowTwinsLoss",
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "DCLLoss",
    "FeatureDistillationLoss",
    "HardNegativeLoss",
    "KoLeoLoss",
    "LeJEPALoss",
    "MoCoLoss",
    "NTXentLoss",
    "PairLoss",
    "SimilarityDistillationLoss",
    "SupConLoss",
    "VICRegLoss",
    "at_least_float32",
    "gather_ids",
    "gather_with_grad",
    "row_std",
    "sinkhorn",
    "sound",
    "unit",
]
