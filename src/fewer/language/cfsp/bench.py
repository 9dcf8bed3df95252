"""Races: writing with a pruned model against the dense one, pruning against other structured pruners at the same width."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from fewer.errors import require
from fewer.language.cfsp.calibration import calibrate
from fewer.language.cfsp.gated_mlp import decoder_layers, parts_of
from fewer.language.cfsp.pruning import prune
from fewer.study import Bench
from fewer.tasks import load_small_lm, token_loss

bench = Bench("cfsp")
REMOVED = 0.5
Work = Callable[[], object]


def _wide_llama() -> Any:
    """A Llama of hidden width 2,048 with random weights: two layers are enough to time what a layer takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=2048, intermediate_size=5504, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4
    )
    return LlamaForCausalLM(config).eval()


@bench.race(
    "writing 8 tokens, random Llama of width 2,048, half of the channels removed",
    peer="the dense model",
    reach=(1 - 0.66 * REMOVED) * 1.1,
)
def decode() -> tuple[Work, Work]:
    dense = _wide_llama()
    pruned = copy.deepcopy(dense)
    ids = torch.randint(2048, (1, 32), generator=torch.Generator().manual_seed(0))
    prune(pruned, calibrate(pruned, [ids]), REMOVED, multiple_of=128)
    words = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    return lambda: pruned.generate(ids, **words), lambda: dense.generate(ids, **words)


def _calibration(lm: Any) -> list[torch.Tensor]:
    return list(lm.train[: 16 * 256].reshape(16, 256).split(4))


def _optipfair(model: Any, batches: list[torch.Tensor]) -> Any:
    """optipfair's data-driven pruning of gated MLPs to the same width."""
    peer = require("optipfair", "peers")
    return peer.prune_model(
        model=model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * REMOVED,
        dataloader=[{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches],
        show_progress=False,
    )


def _ours(model: Any, batches: list[torch.Tensor]) -> Any:
    prune(model, calibrate(model, batches), REMOVED, "none", multiple_of=16)
    return model


@bench.race("calibrating on 4,096 tokens and pruning half, the small language model", peer="optipfair, data-driven", reach=1.0)
def against_optipfair() -> tuple[Work, Work]:
    lm = load_small_lm()
    batches = _calibration(lm)
    return lambda: _ours(copy.deepcopy(lm.model), batches), lambda: _optipfair(copy.deepcopy(lm.model), batches)


@bench.quantity("validation loss, half removed at equal widths", peer="optipfair, data-driven", unit="", reach=1.0)
def loss_against_optipfair() -> tuple[float, float]:
    lm = load_small_lm()
    batches = _calibration(lm)
    return tuple(token_loss(make(copy.deepcopy(lm.model), batches), lm.validation[:24_000]) for make in (_ours, _optipfair))  # pyright: ignore[reportReturnType]


def _torch_pruning(model: Any) -> Any:
    """torch-pruning's magnitude pruning of the feed-forward channels, following its dependency graph."""
    peer = require("torch_pruning", "peers")
    example = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}
    widths = {parts_of(layer)[0]: REMOVED for layer in decoder_layers(model)}
    ignored = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module not in widths]
    pruner = peer.pruner.BasePruner(
        model,
        example,
        importance=peer.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=widths,
        ignored_layers=[
            module for module in ignored if not any(module is part for layer in decoder_layers(model) for part in parts_of(layer))
        ],
        forward_fn=lambda m, x: m(**x),
    )
    pruner.step()
    return model


@bench.quantity("validation loss, half removed at equal widths", peer="torch-pruning, magnitude of the group", unit="", reach=1.0)
def loss_against_torch_pruning() -> tuple[float, float]:
    lm = load_small_lm()
    ours, theirs = _ours(copy.deepcopy(lm.model), _calibration(lm)), _torch_pruning(copy.deepcopy(lm.model))
    assert [parts_of(layer)[0].out_features for layer in decoder_layers(ours)] == [
        parts_of(layer)[0].out_features for layer in decoder_layers(theirs)
    ], "equal widths"
    return token_loss(ours, lm.validation[:24_000]), token_loss(theirs, lm.validation[:24_000])
