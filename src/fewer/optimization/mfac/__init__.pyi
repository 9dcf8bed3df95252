from .gradients import collect_gradients
from .inverse_fisher import InverseFisher
from .optimizer import MFAC
from .pruning import MFACPruning, PruneReport, obs_scores, prune_module
from .window.sliding_window import SlidingInverseFisher

__all__ = [
    "MFAC",
    "InverseFisher",
    "MFACPruning",
    "PruneReport",
    "SlidingInverseFisher",
    "collect_gradients",
    "obs_scores",
    "prune_module",
]
