"""Small random models of every family, and what the tests of S2FT do with them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from host_models import small_decoder

from fewer.language import S2FTConfig, S2FTModel, get_s2ft_model

torch.set_num_threads(1)  # the models are so small that a second thread only waits

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "max_position_embeddings": 32}
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-grouped": ("llama", {"num_key_value_heads": 2}),
    "mistral": ("mistral", {"num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 6}),
    "opt": ("opt", {"dropout": 0.0}),
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}
FAMILIES = sorted(MADE)
IDS = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
LAYOUTS: dict[str, dict[str, Any]] = {"permuted": {}, "gather": {"layout": "gather"}, "delta": {"in_place": False}}
EVERY = {"v_ratio": 0.3, "o_ratio": 0.3, "u_ratio": 0.2, "d_ratio": 0.2}


def make(name: str = "llama-grouped", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose weights and biases are all random, and large enough that every part of it matters; torch's generator goes on from there."""
    model, drawn_until = _made(name, seed)
    torch.set_rng_state(drawn_until)
    return copy.deepcopy(model).to(dtype)


@functools.cache
def _made(name: str, seed: int) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(seed)
    family, words = MADE[name]
    model = small_decoder(family, **SIZES | words)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval(), torch.get_rng_state()


def logits(model: Any, ids: torch.Tensor = IDS, **words: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **words).logits


def loss_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: Any, steps: int = 10, optimizer: Any = None) -> Any:
    """A few steps on fixed tokens, others in each step."""
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, torch.randint(3, 64, (3, 9), generator=draw)).backward()
        optimizer.step()
    return optimizer


def wrap(name: str = "llama-grouped", dtype: torch.dtype = torch.float32, **words: Any) -> S2FTModel:
    """One of them, wrapped; every kind of unit is trained unless told otherwise."""
    return get_s2ft_model(make(name, dtype), S2FTConfig(**(words or EVERY)))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def bits_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def assert_tied(model: Any) -> None:
    """Changing S changes the forward pass, and changing it back changes it back."""
    before = logits(model)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.s.add_(0.5)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.s.sub_(0.5)
    assert torch.allclose(logits(model), before, atol=1e-1)
