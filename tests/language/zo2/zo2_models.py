"""Small models for the tests of ZO2, and MeZO written down as its own trainer has it."""

from __future__ import annotations

from typing import Any

import torch
from host_models import small_decoder
from torch import nn
from zo2_stack import Stack

from fewer.language import ZO2, ZO2Config

MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama-tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "opt": ("opt", {"hidden_size": 16, "intermediate_size": 24}),
    "gpt2": ("gpt2", {"hidden_size": 16, "intermediate_size": 64}),
}
IDS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
LR, DECAY, EPS = 1e-2, 0.1, 1e-3


def make(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    family, words = MADE[name]
    return small_decoder(family, **words).to(dtype).train()  # with dropout, where the family has it: a step must switch it off


def streamed(model: Any, folder: Any = None, resume: bool = False, **words: Any) -> ZO2:
    """A ZO2 with the settings of `mezo_steps`."""
    if words.get("store") == "disk":
        words["store_dir"] = str(folder / "store")
    config = ZO2Config(**{"lr": LR, "weight_decay": DECAY, "working_device": "cpu", "store": "none"} | words)
    return ZO2(model, config, "steps" if isinstance(model, Stack) else None, resume=resume)


@torch.no_grad()
def mezo_steps(
    model: Any, seeds: list[int], loss_of: Any = None, lrs: list[float] | None = None, decay: float = DECAY
) -> list[tuple[float, float]]:
    """(loss, g) of MeZO's steps, in place, by torch's global generator, as princeton-nlp/MeZO's trainer has them."""
    model.eval()
    loss_of = loss_of or (lambda: model(input_ids=IDS, labels=IDS, use_cache=False).loss)

    def perturb(scaling: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(mean=0, std=1, size=parameter.data.size(), device=parameter.device, dtype=parameter.dtype)
            parameter.data = parameter.data + scaling * z * EPS

    told = []
    for seed, lr in zip(seeds, lrs or [LR] * len(seeds), strict=True):
        perturb(1)
        one = loss_of()
        perturb(-2)
        two = loss_of()
        perturb(1)
        g = ((one - two) / (2 * EPS)).item()
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            z = torch.normal(mean=0, std=1, size=parameter.data.size(), device=parameter.device, dtype=parameter.dtype)
            if any(word in name for word in ("bias", "layer_norm", "layernorm", "ln")):
                parameter.data = parameter.data - lr * g * z
            else:
                parameter.data = parameter.data - lr * (g * z + decay * parameter.data)
        told.append((one.item(), g))
    return told


def seeds(count: int) -> list[int]:
    return [ZO2Config().step_seed(step) for step in range(count)]


def same(zo2: ZO2, model: nn.Module) -> bool:
    """Whether all parameters are equal to the bit."""
    state = zo2.state_dict()["model"]
    return all(torch.equal(value, state[name]) for name, value in model.named_parameters())
