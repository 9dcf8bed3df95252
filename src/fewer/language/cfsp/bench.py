"""Races: writing with a pruned model against the dense one, pruning against other structured pruners at the same width."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from fewer.language._shared.feed_forward import decoder_layers, parts_of
from fewer.language._shared.timing import random_llama
from fewer.language.cfsp.calibration import calibrate
from fewer.language.cfsp.peers import REMOVED, optipfair, torch_pruning
from fewer.language.cfsp.pruning import prune
from fewer.study import Bench
from fewer.tasks import load_small_lm, token_loss

bench = Bench("cfsp")
Work = Callable[[], object]


def _wide_llama() -> Any:
    """A Llama of hidden width 2,048 with random weights: two layers are enough to time what a layer takes."""
    return random_llama(
        vocab_size=2048, hidden_size=2048, intermediate_size=5504, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4
    )


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


def _ours(model: Any, batches: list[torch.Tensor]) -> Any:
    prune(model, calibrate(model, batches), REMOVED, "none", multiple_of=16)
    return model


@bench.race("calibrating on 4,096 tokens and pruning half, the small language model", peer="optipfair, data-driven", reach=1.0)
def againstoptipfair() -> tuple[Work, Work]:
    lm = load_small_lm()
    batches = _calibration(lm)
    return lambda: _ours(copy.deepcopy(lm.model), batches), lambda: optipfair(copy.deepcopy(lm.model), batches)


@bench.quantity("validation loss, half removed at equal widths", peer="optipfair, data-driven", unit="", reach=1.0)
def loss_againstoptipfair() -> tuple[float, float]:
    lm = load_small_lm()
    batches = _calibration(lm)
    return tuple(token_loss(make(copy.deepcopy(lm.model), batches), lm.validation[:24_000]) for make in (_ours, optipfair))  # pyright: ignore[reportReturnType]


@bench.quantity("validation loss, half removed at equal widths", peer="torch-pruning, magnitude of the group", unit="", reach=1.0)
def loss_againsttorch_pruning() -> tuple[float, float]:
    lm = load_small_lm()
    ours, theirs = _ours(copy.deepcopy(lm.model), _calibration(lm)), torch_pruning(copy.deepcopy(lm.model))
    assert [parts_of(layer)[0].out_features for layer in decoder_layers(ours)] == [
        parts_of(layer)[0].out_features for layer in decoder_layers(theirs)
    ], "equal widths"
    return token_loss(ours, lm.validation[:24_000]), token_loss(theirs, lm.validation[:24_000])
