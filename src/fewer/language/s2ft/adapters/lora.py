"""An adapter as a LoRA adapter that does exactly the same: one of the two thin matrices selects the trained rows or columns."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fewer.errors import require
from fewer.files import check_new, made_whole
from fewer.language.s2ft.adapters.adapter import WEIGHTS_FILE, Adapter, Slice
from fewer.language.s2ft.model import S2FTModel

CONV1D = ("c_attn", "c_fc", "c_proj")  # GPT-2's maps, whose weights are stored as [in, out]


def lora_factors(part: Slice) -> tuple[Tensor, Tensor]:
    """(A [s, in], B [out, s]) with B A = delta W, float32.

    For columns delta W = delta E with E the one-hot rows that select them: A = E, B = delta. For rows A = delta, B = one-hot.

    >>> part = Slice("columns", torch.tensor([0, 3]), torch.tensor([[1.0, 2.0]]), size=4)
    >>> a, b = lora_factors(part)
    >>> (b @ a).tolist()
    [[1.0, 0.0, 0.0, 2.0]]
    """
    one_hot = F.one_hot(part.index, part.size).to(torch.float32)
    delta = part.delta.to(torch.float32)
    return (one_hot, delta) if part.side == "columns" else (delta, one_hot.T)


def to_peft_lora(model: S2FTModel | Path | str, out_dir: Path | str, *, overwrite: bool = False) -> Path:
    """Write an adapter as a peft LoRA directory, whole or not at all: with it the base is the merged model.

    Args:
        model: a wrapped model (its active adapter is taken), or the directory that its `save_pretrained` wrote.
        out_dir: a new or empty directory.
        overwrite: replace what stands in the directory.

    Raises:
        FileExistsError: the directory is not empty and overwrite is false.
        ValueError: the directory holds no adapter.
    """
    out = Path(out_dir)
    inputs = [] if isinstance(model, S2FTModel) else [model]
    check_new(out, overwrite, inputs=inputs, option="OUT")
    adapter = model.adapter() if isinstance(model, S2FTModel) else Adapter.load(model)
    ranks = {path: len(part.index) for path, part in adapter.slices.items()}
    config = require("peft", "language").LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,  # alpha = r: the change is taken as it is
        target_modules=sorted(ranks),
        fan_in_fan_out=all(path.endswith(CONV1D) for path in ranks),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    tensors = {}
    for path, part in adapter.slices.items():
        a, b = lora_factors(part)
        for name, value in (("A", a), ("B", b)):
            tensors[f"base_model.model.{path}.lora_{name}.weight"] = value.contiguous()
    with made_whole(out, overwrite, inputs=inputs, option="OUT") as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return out
