from . import block_ffn, cfsp, ffn_skip, first_finish_search, s2ft, zo2
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
from .ffn_skip import FFNSkipConfig, FFNSkipStats, disable_ffn_skip, enable_ffn_skip, teacher_forced
from .first_finish_search import (
    AsyncFFS,
    Diagnosis,
    FFSError,
    FFSResult,
    RaceConfig,
    Trace,
    beam,
    budget_forcing,
    diagnose,
    expected_min,
    ffs_accuracy,
    ffs_generate,
    ffs_request,
    last_finish,
    majority_vote,
)  # fmt: skip
from .s2ft import S2FTConfig, S2FTModel, S2Linear, get_s2ft_model, memory_plan, permute_, select_units, to_peft_lora
from .zo2 import ZO2, MeZO, StepResult, Update, ZO2Config, ZO2Trainer, replay

__all__ = [
    "ZO2", "AdaptiveFactor", "AdaptiveFactorCallback", "AsyncFFS", "BlockFFN", "BlockFFNConfig", "BlockFFNForCausalLM", "CfspStats",
    "Diagnosis", "FFNSkipConfig", "FFNSkipStats", "FFSError", "FFSResult", "GenerateOutput", "MeZO", "PruneReport", "RaceConfig", "S2FTConfig", "S2FTModel", "S2Linear",
    "SparsityStats", "StepResult", "Trace", "Update", "ZO2Config", "ZO2Trainer", "activation_locality_loss", "allocate", "beam",
    "block_ffn", "budget_forcing", "calibrate", "cfsp", "channel_importance", "chunk_sparsification_loss", "diagnose", "disable_ffn_skip", "enable_ffn_skip",
    "expected_min", "ffn_skip",
    "ffs_accuracy", "ffs_generate", "ffs_request", "first_finish_search", "get_s2ft_model", "last_finish", "lora_ranks", "majority_vote",
    "memory_plan", "model_sparsity", "permute_", "prune", "recover", "replay", "s2ft", "save_pruned", "select_units", "sparsity_stats",
    "speculative_generate", "teacher_forced", "to_peft_lora", "zo2",
]  # fmt: skip
