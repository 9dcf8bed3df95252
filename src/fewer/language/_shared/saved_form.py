"""A model whose layers have widths of their own, as something that transformers saves and loads."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn

from fewer.language._shared.feed_forward import decoder_layers, parts_of, width_of
from fewer.language._shared.modeling_fewer import FAMILIES, register

register()
NOT_COPIED = ("model_type", "architectures", "transformers_version", "auto_map")


def plain_type(model: nn.Module) -> str:
    """The model type of transformers, that of its plain class where layers have widths of their own."""
    return cast(Any, model).config.model_type.removeprefix("fewer_")


def check_savable(model: nn.Module) -> None:
    """ValueError where layers of a model of this type may not differ in width."""
    if plain_type(model) not in FAMILIES or type(model) not in (FAMILIES[plain_type(model)][1], FAMILIES[plain_type(model)][1].__mro__[2]):
        raise ValueError(
            f"{type(model).__name__} ({plain_type(model)}) is of no family whose layers may differ in width when they are saved; "
            f"expected one of {', '.join(FAMILIES)}: keep all layers alike (global_metric='none', --export uniform)"
        )


def take_own_widths(model: nn.Module) -> None:
    """Make a model, in place, one whose class and config say its layers' widths, so that `save_pretrained` writes what loads.

    Where all are equal it stays (or becomes again) one of the plain class.
    """
    widths = [width_of(layer) for layer in decoder_layers(model)]
    config: Any = cast(Any, model).config
    if len(set(widths)) == 1 and not config.model_type.startswith("fewer_"):
        config.intermediate_size = widths[0]
        return
    check_savable(model)
    config_class, model_class = FAMILIES[plain_type(model)]
    size: Any = widths
    if len(set(widths)) == 1:
        size, config_class, model_class = widths[0], config_class.__mro__[1], model_class.__mro__[2]
    become(model, config_class, model_class, intermediate_size=size)


def become(model: nn.Module, config_class: Any, model_class: Any, *, without: Collection[str] = (), **words: Any) -> None:
    """Give a model another class, in place, and the config that goes with it wherever it is held.

    Args:
        without: settings that the new config does not know.
        words: settings that are other, or new.
    """
    config = cast(Any, model).config
    made = in_class(config, config_class, without=without, **words)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            cast(Any, module).config = made
    model.__class__ = model_class


def padded(model: nn.Module) -> Any:
    """The same model with every layer filled up with channels of zeros to the widest, in its plain class."""
    plain: Any = type(model) if plain_type(model) not in FAMILIES else FAMILIES[plain_type(model)][1].__mro__[2]
    config: Any = cast(Any, model).config
    width = max(width_of(layer) for layer in decoder_layers(model))
    with torch.no_grad():
        filled = plain(in_class(config, plain.config_class, intermediate_size=width)).to(next(model.parameters()).dtype)
        for layer in decoder_layers(filled):
            for linear in parts_of(layer):
                for parameter in linear.parameters():
                    parameter.zero_()
        state = filled.state_dict()
        for name, value in model.state_dict().items():
            state[name][tuple(slice(size) for size in value.shape)].copy_(value)
    filled.generation_config = cast(Any, model).generation_config
    return filled.eval()


def in_class(config: Any, into: Any, *, without: Collection[str] = (), **words: Any) -> Any:
    """The same settings in another config class (see `become`)."""
    kept = {name: value for name, value in config.to_dict().items() if name not in (*NOT_COPIED, *without)}
    made = into(**kept | words)
    made._attn_implementation = config._attn_implementation
    return made
