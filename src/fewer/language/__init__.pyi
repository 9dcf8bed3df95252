from . import block_ffn, cfsp, factor_llm, ffn_skip, first_finish_search, moe_plus_plus, s2ft, spt, zo2
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
from .factor_llm import (
    Adaptation,
    AdaptConfig,
    FactorizedMLP,
    FactorLlamaConfig,
    FactorLlamaForCausalLM,
    FactorLoss,
    adapt,
    factorize,
    oracle,
    prior_approximate_loss,
    unfactorize,
)
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
from .moe_plus_plus import (
    MoEPlusPlus,
    MoEPlusPlusConfig,
    MoEPlusPlusForCausalLM,
    MoEPlusPlusOutput,
    MoEPlusPlusStats,
    expert_parallel,
    heterogeneous_capacity,
    heterogeneous_load_balance_loss,
    load_released,
)
from .s2ft import S2FTConfig, S2FTModel, S2Linear, get_s2ft_model, memory_plan, permute_, select_units, to_peft_lora
from .spt import CSR, ProductQuantizer, RoutedFFN, RoutedGatedFFN, SPTConfig, SPTModel, get_spt_model, lookup, sparse_attention
from .zo2 import ZO2, MeZO, StepResult, Update, ZO2Config, ZO2Trainer, replay

__all__ = ["CSR", "ZO2", "AdaptConfig", "Adaptation", "AdaptiveFactor", "AdaptiveFactorCallback", "AsyncFFS", "BlockFFN", "BlockFFNConfig", "BlockFFNForCausalLM", "CfspStats", "Diagnosis", "FFNSkipConfig", "FFNSkipStats", "FFSError", "FFSResult", "FactorLlamaConfig", "FactorLlamaForCausalLM", "FactorLoss", "FactorizedMLP", "GenerateOutput", "MeZO", "MoEPlusPlus", "MoEPlusPlusConfig", "MoEPlusPlusForCausalLM", "MoEPlusPlusOutput", "MoEPlusPlusStats", "ProductQuantizer", "PruneReport", "RaceConfig", "RoutedFFN", "RoutedGatedFFN", "S2FTConfig", "S2FTModel", "S2Linear", "SPTConfig", "SPTModel", "SparsityStats", "StepResult", "Trace", "Update", "ZO2Config", "ZO2Trainer", "activation_locality_loss", "adapt", "allocate", "beam", "block_ffn", "budget_forcing", "calibrate", "cfsp", "channel_importance", "chunk_sparsification_loss", "diagnose", "disable_ffn_skip", "enable_ffn_skip", "expected_min", "expert_parallel", "factor_llm", "factorize", "ffn_skip", "ffs_accuracy", "ffs_generate", "ffs_request", "first_finish_search", "get_s2ft_model", "get_spt_model", "heterogeneous_capacity", "heterogeneous_load_balance_loss", "last_finish", "load_released", "lookup", "lora_ranks", "majority_vote", "memory_plan", "model_sparsity", "moe_plus_plus", "oracle", "permute_", "prior_approximate_loss", "prune", "recover", "replay", "s2ft", "save_pruned", "select_units", "sparse_attention", "sparsity_stats", "speculative_generate", "spt", "teacher_forced", "to_peft_lora", "unfactorize", "zo2"]  # fmt: skip
