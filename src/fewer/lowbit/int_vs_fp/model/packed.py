"""The cast weights of a model, packed: written as safetensors, and put back into the plain model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from fewer.files import made_whole, read_json, read_weights
from fewer.lowbit._shared.block_formats import BlockFormat
from fewer.lowbit._shared.blocks import QuantizedTensor, quantize
from fewer.lowbit._shared.conversion import converted, exchange, linear_maps
from fewer.lowbit._shared.rotation import hadamard
from fewer.lowbit.int_vs_fp.model.linear import LOADED, QuantLinear

WEIGHTS, ABOUT = "packed.safetensors", "packed.json"


@torch.no_grad()
def packed_weights(model: nn.Module) -> dict[str, QuantizedTensor]:
    """layer -> its weight as its products use it (rotated where it rotates), packed.

    Raises:
        ValueError: no layer is converted, or a quantiser is not the plain cast of its format, which has no codes.
    """
    found = {}
    for name, layer in converted(model, QuantLinear).items():
        for quantiser in (layer.fmt_w, layer.fmt_x):
            if quantiser != type(quantiser)(quantiser.fmt):
                raise ValueError(f"{name} is cast by an ablation ({quantiser.name}); expected the plain cast of a format: convert it anew")
        found[name] = quantize(layer.turned(layer.weight.detach()), layer.fmt_w.fmt)
    if not found:
        raise ValueError("no layer is converted; expected a model that `convert` was given: convert it first")
    return found


def save_packed(model: nn.Module, directory: str | Path, *, overwrite: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """Write the cast weights of a converted model: packed.safetensors, and packed.json with the layers' formats and rotations.

    Args:
        directory: a new directory; with `overwrite` one that fewer wrote.
        inputs: what may not be overwritten.

    Returns:
        The directory. `load_packed` puts the weights into the plain model.
    """
    from safetensors.torch import save_file

    weights = packed_weights(model)
    layers = {
        name: {"input": asdict(layer.fmt_x.fmt), "rotate": layer.rotate, "seed": layer.seed}
        for name, layer in converted(model, QuantLinear).items()
    }
    tensors = {f"{name}.{part}": tensor for name, packed in weights.items() for part, tensor in packed.to_dict().items()}
    with made_whole(directory, overwrite, inputs=inputs) as folder:
        save_file(tensors, folder / WEIGHTS)
        (folder / ABOUT).write_text(json.dumps({"layers": layers}, indent=1) + "\n", encoding="utf8")
    return Path(directory)


@torch.no_grad()
def load_packed(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put packed weights into a plain model of the same shape, in place: its layers compute as those that were saved, bit for bit.

    Raises:
        ValueError: it is no such directory, or of another model.
    """
    about, tensors = read_json(Path(directory) / ABOUT), read_weights(Path(directory) / WEIGHTS)
    layers = about.get("layers")
    plain = dict(linear_maps(model))
    if not isinstance(layers, Mapping) or set(layers) - set(plain):
        strange = sorted(set(layers or ()) - set(plain))[:3]
        raise ValueError(f"{directory} holds layers that the model has not ({', '.join(strange)}); expected those of this model")
    made = []
    for name, told in layers.items():
        packed = QuantizedTensor.from_dict({key: tensors[f"{name}.{key}"] for key in _parts(tensors, name)})
        if packed.shape != plain[name].weight.shape:
            raise ValueError(
                f"{directory}: {name} is {tuple(packed.shape)}; expected {tuple(plain[name].weight.shape)}, as the model has it"
            )
        try:
            words = {"rotate": int(told["rotate"]) or None, "seed": int(told["seed"]), "name": name}
            layer = QuantLinear.from_linear(plain[name], packed.fmt, BlockFormat(**told["input"]), **words)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{Path(directory) / ABOUT}: {name} has no {error}; expected what `save_packed` writes: save it again"
            ) from error
        made.append((name, layer, packed))
    for name, layer, packed in made:
        cast = packed.dequantize(layer.weight.dtype).to(layer.weight.device)
        plain_weight = hadamard(cast, layer.rotate, signs=layer.signs, inverse=True) if layer.rotate else cast
        layer.weight = nn.Parameter(plain_weight, requires_grad=False)
        layer.cast_weight, layer._cast_version, layer._loaded_version = cast, LOADED, layer.weight._version
        exchange(model, name, layer)
    return model


def _parts(tensors: Mapping[str, object], name: str) -> list[str]:
    return [key for key in ("codes", "scales", "about", "tensor_scale") if f"{name}.{key}" in tensors]
