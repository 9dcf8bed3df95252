"""Random Llamas of width 1,024: a whole one in a directory, and some layers of it in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch

from fewer.data import WEIGHTS, folder_of, made_once
from fewer.files import read_json
from fewer.language._shared.timing import random_llama

SHAPE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 4096}


def wide_layers(layers: int, **shape: int) -> Any:
    """Some layers of the wide model, in memory; `shape` makes them smaller."""
    return random_llama(num_hidden_layers=layers, tie_word_embeddings=True, **SHAPE | shape)


def wide_model() -> Path:
    """The directory of a random Llama of 312 million parameters (1.25 GB), written once."""
    shape = SHAPE | {"num_hidden_layers": 24}

    def make(folder: Path) -> None:
        wide_layers(24).save_pretrained(folder, max_shard_size="4GB")
        assert (folder / WEIGHTS).is_file()

    return made_once(folder_of("models", "random-llama", {"version": 1} | shape), make)


def resident() -> int:
    return psutil.Process().memory_info().rss


def warm(folder: Path) -> None:
    """Load the code that a model of the directory needs, so that it counts as library and not as model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = read_json(folder / "config.json")["model_type"]
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model(kind, **small)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
