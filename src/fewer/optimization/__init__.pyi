from . import mfac
from .mfac import MFAC, InverseFisher, MFACPruning, PruneReport, SlidingInverseFisher, collect_gradients, obs_scores, prune_module

__all__ = [
    "MFAC",
    "InverseFisher",
    "MFACPruning",
    "PruneReport",
    "SlidingInverseFisher",
    "collect_gradients",
    "mfac",
    "obs_scores",
    "prune_module",
]
