from . import block_ffn, cfsp, s2ft, zo2
from .block_ffn import (
    AdaptiveFactor,
    AdaptiveFactorCallback,
    BlockFFN,
    BlockFFNConfig,
    BlockFFNForCausalLM,
    GenerateOutput,
    SparsityStats,
    activation_locality_loss,
    chunk_sparsification_loss,
    model_sparsity,
    sparsity_stats,
    speculative_generate,
)  # fmt: skip
from .cfsp import CfspStats, PruneReport, allocate, calibrate, channel_importance, lora_ranks, prune, recover, save_pruned
from .s2ft import S2FTConfig, S2FTModel, S2Linear, get_s2ft_model, memory_plan, permute_, select_units, to_peft_lora
from .zo2 import ZO2, MeZO, StepResult, Update, ZO2Config, ZO2Trainer, replay

__all__ = [
    "ZO2", "AdaptiveFactor", "AdaptiveFactorCallback", "BlockFFN", "BlockFFNConfig", "BlockFFNForCausalLM", "CfspStats", "GenerateOutput",
    "MeZO", "PruneReport", "S2FTConfig", "S2FTModel", "S2Linear", "SparsityStats", "StepResult", "Update", "ZO2Config", "ZO2Trainer",
    "activation_locality_loss", "allocate", "block_ffn", "calibrate", "cfsp", "channel_importance", "chunk_sparsification_loss",
    "get_s2ft_model", "lora_ranks", "memory_plan", "model_sparsity", "permute_", "prune", "recover", "replay", "s2ft", "save_pruned",
    "select_units", "sparsity_stats", "speculative_generate", "to_peft_lora", "zo2",
]  # fmt: skip
