from .allocation import allocate
from .calibration import CfspStats, calibrate
from .importance import channel_importance
from .pruning import PruneReport, prune, save_pruned
from .recovery import lora_ranks, recover

__all__ = ["CfspStats", "PruneReport", "allocate", "calibrate", "channel_importance", "lora_ranks", "prune", "recover", "save_pruned"]
