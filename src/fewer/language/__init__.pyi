from . import cfsp, s2ft, zo2
from .cfsp import CfspStats, PruneReport, allocate, calibrate, channel_importance, lora_ranks, prune, recover, save_pruned
from .s2ft import S2FTConfig, S2FTModel, S2Linear, get_s2ft_model, memory_plan, permute_, select_units, to_peft_lora
from .zo2 import ZO2, MeZO, StepResult, Update, ZO2Config, ZO2Trainer, replay

__all__ = [
    "ZO2", "CfspStats", "MeZO", "PruneReport", "S2FTConfig", "S2FTModel", "S2Linear", "StepResult", "Update", "ZO2Config", "ZO2Trainer",
    "allocate", "calibrate", "cfsp", "channel_importance", "get_s2ft_model", "lora_ranks", "memory_plan", "permute_", "prune", "recover",
    "replay", "s2ft", "save_pruned", "select_units", "to_peft_lora", "zo2",
]  # fmt: skip
