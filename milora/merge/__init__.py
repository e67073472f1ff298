"""Merging saved adapters into one.   [FLoRA, FFA-LoRA, LoRA-FAIR, LoRA-LEGO, SVD]"""

from milora.merge.folders import MergeReport, merge
from milora.merge.low_rank import LowRank, compress, distance, weighted_stack
from milora.merge.methods import METHODS, Method

__all__ = [
    "METHODS",
    "LowRank",
    "MergeReport",
    "Method",
    "compress",
    "distance",
    "merge",
    "weighted_stack",
]
