from . import cfsp
from .cfsp import CfspStats, PruneReport, allocate, calibrate, channel_importance, lora_ranks, prune, recover, save_pruned

__all__ = [
    "CfspStats", "PruneReport", "allocate", "calibrate", "cfsp", "channel_importance", "lora_ranks", "prune", "recover", "save_pruned",
]  # fmt: skip
