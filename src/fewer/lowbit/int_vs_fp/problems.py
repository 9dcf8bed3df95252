"""What study and bench work on: a language model with windows of text, and a small classifier of digits that is trained in few bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer.data import fetch_smollm2, load_state_of_the_union
from fewer.errors import require
from fewer.inputs import read_pairs
from fewer.language._shared.from_scratch import pretrain
from fewer.language._shared.model_directory import load_directory, load_tokenizer
from fewer.lowbit._shared import digit_classifier
from fewer.lowbit._shared.block_formats import BlockFormat
from fewer.lowbit._shared.conversion import linear_maps
from fewer.lowbit.int_vs_fp.model.linear import Format, convert
from fewer.lowbit.int_vs_fp.quantisers import Quantiser
from fewer.tasks import PRESETS, load_small_lm, token_loss
from fewer.tasks.language_corpus import read_texts, token_stream
from fewer.tasks.lm_training import check_window, draw_windows

ADDRESSES = 8  # the latest: enough for any number of windows


@dataclass(frozen=True)
class ModelAndText:
    """A model's directory, and the tokens of a text.

    Attributes:
        about: which model and text.
        window: tokens read at a time.
    """

    folder: Path
    tokens: Tensor
    about: str
    window: int

    def model(self, device: str = "cpu") -> Any:
        """In float32 and eval mode."""
        return load_directory(self.folder, "float32")[0].to(device)

    def windows(self, seed: int, count: int = 1) -> list[dict[str, Tensor]]:
        """Windows drawn by the seed, each a batch of one, with labels."""
        drawn = draw_windows(self.tokens, count, self.window, torch.Generator().manual_seed(seed))
        return [{"input_ids": row[None], "labels": row[None]} for row in drawn]


def model_and_text(model: str = "", text: str | Sequence[str] = "", data: str = "", window: int = 256) -> ModelAndText:
    """SmolLM2-135M and State of the Union addresses, or a user's model directory, text or pairs in place of them.

    Raises:
        ValueError, FileNotFoundError: no such directory or file, or a text of less than a window.
    """
    folder = Path(model) if model else fetch_smollm2()
    tokenizer = load_directory(folder)[1] if model else load_tokenizer(folder)
    if data:
        documents = [("", prompt + completion) for prompt, completion in read_pairs(data)]
    else:
        documents = read_texts([text] if isinstance(text, str) else text) if text else load_state_of_the_union()[-ADDRESSES:]
    tokens = token_stream(tokenizer, documents)
    check_window(tokens, window)
    named = model or "SmolLM2-135M-Instruct (its weights went through 4 bits once, in blocks of 32: weights at 4 bits look better in INT4)"
    told = data or (text if isinstance(text, str) else ", ".join(map(str, text))) or "State of the Union addresses"
    return ModelAndText(folder, tokens, f"{named}; {told}", window)


def train_digits(fmt: Format | None, seed: int) -> float:
    """Held-out loss of the classifier of digits, its three products of each layer cast to a format (None: float32)."""
    return digit_classifier.train_digits(seed, lambda network: network if fmt is None else convert(network, fmt, train=True))


def train_small_lm(fmt: Format | None, seed: int) -> float:
    """Held-out loss (nats a token) of the two-layer small language model, trained from the start with its products cast to a format."""
    lm, preset = load_small_lm("family-xs"), PRESETS["family-xs"]
    recipe = preset.recipe
    assert recipe is not None
    network = preset.model(seed)
    if fmt is not None:
        convert(network, fmt, train=True)
    pretrain(network, lm.train, recipe)
    return token_loss(network, lm.validation[:24_000], window=recipe.window)


BIASED = Quantiser(BlockFormat("int8", 32, "bf16"), "asymmetric", torch.bfloat16)
UNBIASED = Quantiser(BlockFormat("int8", 32, "bf16"), "symmetric", torch.bfloat16)


def signed_error(quantiser: Quantiser, seed: int, blocks: int = 400_000) -> float:
    """The mean of Q(x) - x over normal draws in bfloat16, blocks of 32, in standard errors."""
    draw = torch.Generator().manual_seed(seed)
    total = squares = count = 0.0
    for part in range(0, blocks, 20_000):
        x = torch.randn(min(20_000, blocks - part), 32, generator=draw).bfloat16()
        error = quantiser(x).double() - x.double()
        total, squares, count = total + float(error.sum()), squares + float(error.square().sum()), count + error.numel()
    return total / count / math.sqrt(squares / count / count)


def torchao_int8(model: Any) -> Any:
    """A model whose linear layers but the head are torchao's: int8 weights by row, activations cast to int8 by token on the fly."""
    quantization = require("torchao.quantization", "peers")
    names = {name for name, _ in linear_maps(model)}
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in names)
    return model


def bytes_of(model: nn.Module, bits: float) -> float:
    """Bytes of a model's weights with its linear layers at so many bits a value, the rest in float32."""
    cast = sum(linear.weight.numel() for _, linear in linear_maps(model))
    return 4 * (sum(parameter.numel() for parameter in model.parameters()) - cast) + cast * bits / 8
