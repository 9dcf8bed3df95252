"""Races: writing with blocks skipped against transformers' generate of the same model, and against the same model with layers removed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fewer.language._shared.prenorm import layers_of
from fewer.language._shared.timing import wide_llama
from fewer.language.ffn_skip.calibration import calibrate
from fewer.language.ffn_skip.config import FFNSkipConfig
from fewer.language.ffn_skip.problems import THREE_OF_EIGHT, WINDOW, WRITTEN, Work, decoding, read_texts
from fewer.study import Bench
from fewer.tasks import load_small_lm
from fewer.tasks.lm_training import draw_windows

bench = Bench("ffn-skip")
WIDE = "random Llama of width 2,048"


@bench.race(f"decoding 8 tokens, {WIDE}, 3 of 8 blocks skipped", peer="transformers, the same model", reach=1 / 1.28)
def writing() -> tuple[Work, Work]:
    model = wide_llama(8)
    return decoding(model, 8, THREE_OF_EIGHT), decoding(model, 8)


@bench.race(f"decoding 4 tokens, {WIDE}, all blocks watched and none skipped", peer="transformers, the same model", reach=1.03)
def watching() -> tuple[Work, Work]:
    model = wide_llama(8)
    return decoding(model, 4, FFNSkipConfig(1, 7, threshold=2.0, warmup_tokens=0)), decoding(model, 4)


@bench.quantity("loss after the warm-up, a quarter of the blocks skipped", peer="transformers, 2 of 8 layers removed", unit="", reach=1.0)
def loss_against_removed_layers() -> tuple[float, float]:
    lm = load_small_lm()
    draw = torch.Generator().manual_seed(0)
    config, report = calibrate(lm.model, draw_windows(lm.train, 8, WINDOW, draw), 0.25, WRITTEN)
    texts = draw_windows(lm.validation, 40, WINDOW, draw)
    window = sorted(range(*report.window), key=lambda layer: float(report.influence[layer]))
    shorter = without(lm.model, window[:2])
    return read_texts(lm.model, texts, config).loss, read_texts(shorter, texts, FFNSkipConfig.off()).loss


def without(model: Any, removed: list[int]) -> Any:
    """A copy of the model with whole layers removed, for all tokens, the prompt's too."""
    shorter = copy.deepcopy(model)
    kept = [layer for number, layer in enumerate(layers_of(shorter.model)) if number not in removed]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    shorter.model.layers, shorter.config.num_hidden_layers = nn.ModuleList(kept), len(kept)
    return shorter
