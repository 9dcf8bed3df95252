from .accounting import PrivacyConfig, epsilon_spent, noise_multiplier
from .adapters import adapter_fingerprint, aggregation_gap, freeze_a, noise_energy
from .algorithm import FedLoRA, LoRARoundsConfig
from .per_example import private_gradient
from .strategy import FFALoRA, ffa_lora_client_app, trained_arrays

__all__ = [
    "FFALoRA",
    "FedLoRA",
    "LoRARoundsConfig",
    "PrivacyConfig",
    "adapter_fingerprint",
    "aggregation_gap",
    "epsilon_spent",
    "ffa_lora_client_app",
    "freeze_a",
    "noise_energy",
    "noise_multiplier",
    "private_gradient",
    "trained_arrays",
]
