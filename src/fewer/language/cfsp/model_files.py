"""Writing a pruned model as a directory that transformers loads, with or without this library."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fewer.data.made_whole import made_whole
from fewer.language.cfsp import modeling_fewer
from fewer.language.cfsp.gated_mlp import decoder_layers, parts_of, width_of

Export = Literal["list", "padded"]

for _config, _model in modeling_fewer.FAMILIES.values():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)


def save_pruned(model: nn.Module, out_dir: Path | str, tokenizer: Any = None, *, export: Export = "list", overwrite: bool = False) -> Path:
    """Write a pruned model as a directory, whole or not at all.

    Args:
        model: as `prune` or `recover` left it.
        out_dir: a new or empty directory.
        tokenizer: written beside the weights where it is given.
        export: "list" keeps every layer's own width: `intermediate_size` is a list, and the file that can read it is written beside the
            weights (this library loads it as it is, others with `trust_remote_code=True`). Where all widths are equal, plain transformers
            loads it. "padded" fills every layer up with zeros to the widest, so that plain transformers always does.
        overwrite: replace what stands in the directory.

    Raises:
        FileExistsError: the directory is not empty and overwrite is false.
        ValueError: the model's family is not known, or it has been saved in this form already.
    """
    out = Path(out_dir)
    with made_whole(out, overwrite) as part:
        _write(model, part, export)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return out


def _write(model: nn.Module, folder: Path, export: Export) -> None:
    widths = [width_of(layer) for layer in decoder_layers(model)]
    if export == "padded":
        padded(model, max(widths)).save_pretrained(folder)
    elif len(set(widths)) == 1:
        cast(Any, model).save_pretrained(folder)
    else:
        of_own_widths(model, widths).save_pretrained(folder)
        shutil.copyfile(cast(str, modeling_fewer.__file__), folder / "modeling_fewer.py")


def of_own_widths(model: nn.Module, widths: list[int]) -> Any:
    """The same weights in the class whose config has a list of widths."""
    plain = cast(Any, model).config
    family = plain.model_type.removeprefix("fewer_")
    if family not in modeling_fewer.FAMILIES:
        raise ValueError(
            f"{type(model).__name__} is of no family whose layers may differ in width; expected one of {', '.join(modeling_fewer.FAMILIES)}, or export='padded'"
        )
    config_class, model_class = modeling_fewer.FAMILIES[family]
    words = {name: value for name, value in plain.to_dict().items() if name not in ("model_type", "architectures", "transformers_version")}
    auto_map = {
        "AutoConfig": f"modeling_fewer.{config_class.__name__}",
        "AutoModelForCausalLM": f"modeling_fewer.{model_class.__name__}",
    }
    config = config_class(**words | {"intermediate_size": widths, "auto_map": auto_map})
    return _filled(model_class, config, model)


def padded(model: nn.Module, width: int) -> Any:
    """The same model with every layer filled up with channels of zeros, in its plain class."""
    plain = cast(Any, model).config
    base: Any = type(model) if not plain.model_type.startswith("fewer_") else type(model).__mro__[2]
    config_class = base.config_class
    words = {
        name: value
        for name, value in plain.to_dict().items()
        if name not in ("model_type", "architectures", "transformers_version", "auto_map")
    }
    with torch.no_grad():
        filled = base(config_class(**words | {"intermediate_size": width})).to(next(model.parameters()).dtype)
        for layer in decoder_layers(filled):
            for linear in parts_of(layer):
                linear.weight.zero_()
        state = filled.state_dict()
        for name, value in model.state_dict().items():
            corner = state[name][tuple(slice(size) for size in value.shape)]
            corner.copy_(value)
    filled.generation_config = cast(Any, model).generation_config
    return filled.eval()


def _filled(model_class: Any, config: Any, model: nn.Module) -> Any:
    made = model_class(config).to(next(model.parameters()).dtype)
    made.load_state_dict(model.state_dict())
    made.generation_config = cast(Any, model).generation_config
    return made.eval()
