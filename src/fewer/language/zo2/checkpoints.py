"""Models in directories, read and written a block at a time, so that none is ever whole in memory; and journals, which are models in some kB."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer.files import read_json, whole_file
from fewer.language._shared.model_directory import INDEX, SAFE, checked_kind, layers_in, told, weight_files, weight_shapes
from fewer.language.zo2.mezo import Update, ZO2Config

STATE = "index.json"  # of a store: names the generation that is whole; renamed last


class Weights:
    """The weights of a model directory, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        checked_kind(folder)
        layers_in(weight_shapes(folder), folder)
        self.folder, self.files, self.dtype = folder, {}, torch.float32
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as stored:
                self.files |= dict.fromkeys(stored.keys(), file)
        self.dtype = self(next(name for name in self.files)).dtype

    def __call__(self, name: str) -> Tensor:
        """A weight, in memory of its own; the file is closed again, so that nothing of it stays mapped."""
        from safetensors import safe_open

        if name not in self.files:
            raise ValueError(
                f"{self.folder} lacks {name}; expected all weights under the model's own names: save it with transformers again"
            )
        with safe_open(self.files[name], framework="pt") as stored:
            return stored.get_tensor(name).clone()


def skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """The model of a directory's config in eval mode, its parameters without memory, its buffers real."""
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with told(f"{folder / 'config.json'} cannot be used"), accelerate.init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **SAFE), dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """A parameter's value, in memory of its own, wherever the model uses the parameter."""
    old = model.get_parameter(name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[leaf] = new


def move(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """What stays on the device goes there: the named parameters, and all buffers."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.to(device)


class Digest:
    """What tells a model's weights from any other's, taken in one after the other in any order."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}

    def watched(self, value_of: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """The same function, each of whose values is taken in."""

        def value(name: str) -> Tensor:
            found = value_of(name)
            words = f"{name} {found.dtype} {tuple(found.shape)}".encode()
            data = found.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            self.parts[name] = hashlib.sha256(words + hashlib.sha256(data).digest()).hexdigest()
            return found

        return value

    def __str__(self) -> str:
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:16]


def write_shards(model: Any, folder: Path, shards: Iterable[dict[str, Tensor]]) -> None:
    """A directory that `from_pretrained` reads: config, and each shard's tensors in a file of their own."""
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        with contextlib.suppress(ValueError):  # some models carry one that transformers itself refuses to write
            model.generation_config.save_pretrained(folder)
    names: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}.safetensors"
        own = {name: tensor.detach().cpu().clone() for name, tensor in shard.items()}
        save_file(own, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(own, file)
        size += sum(tensor.nbytes for tensor in own.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=1), encoding="utf8")


def write_journal(file: Path, base: str, config: ZO2Config, updates: Iterable[Update], *, overwrite: bool = False) -> None:
    """A fine-tuned model as what it began as and what was done to it: some 50 bytes a step."""
    plain = {"base": base, "config": config.to_dict() | {"store_dir": None}, "updates": [list(each) for each in updates]}
    with whole_file(file, overwrite, option="the journal") as part:
        part.write_text(json.dumps(plain), encoding="utf8")


def read_journal(file: Path) -> tuple[str, ZO2Config, list[Update]]:
    """(digest of the base, config, updates); ValueError where it is no journal."""
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{file} is no file; expected journal.json of a run of zo2")
    read = read_json(file)
    try:
        words = dict(read["config"])
        config = ZO2Config.from_dict(words | {"store": "none" if not words.get("store_dtype") else "cpu", "store_dir": None})
        updates = [Update(int(seed), float(g), float(lr)) for seed, g, lr in read["updates"]]
        return str(read["base"]), config, updates
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no journal ({error}); expected what a run of zo2 wrote") from error


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a store; ValueError where it is none."""
    if not (folder / STATE).is_file():
        raise FileNotFoundError(f"{folder} has no {STATE}; expected the store of a run of zo2")
    state = read_json(folder / STATE)
    lacking = {"steps", "generation", "walks", "pending", "config", "layout", "journal", "blocks", "dtype"} - set(state)
    if lacking:
        raise ValueError(f"{folder / STATE} lacks {', '.join(sorted(lacking))}; expected the index of a store of zo2")
    return state
