"""A user's model directory, read by one piece of code: nothing of it is run, and what is wrong with it is told in one line."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewer.files import read_json
from fewer.inputs import stored_tensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OURS = "fewer_"  # how types of this library begin: "fewer_llama" has layers of their own widths, "fewer_METHOD" is in METHOD/model.py
ODD = 10_000  # more layers than any model has: the number is held against the weights before anything is made of it
SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def load_directory(model_dir: Path | str, dtype: str = "auto", *, dense: bool = False) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a directory that transformers wrote.

    No code of the directory's own is run, nothing is fetched, weights are read as safetensors alone, and a weight that the model has and
    the directory lacks is an error.

    Args:
        dtype: "auto" is that of the weights.
        dense: refuse a model that has been pruned to widths of its own already.

    Raises:
        ValueError: it is no such directory; the message names the file and the reason.
    """
    folder = Path(model_dir)
    kind = checked_kind(folder)
    if dense and kind.startswith(OURS):
        raise ValueError(f"{folder} holds a model that is pruned already; expected the dense one")
    layers = layers_in(weight_shapes(folder), folder)
    with _quiet():
        return _model(folder, layers, dtype), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory; ValueError where there is none that can be read."""
    from transformers import AutoTokenizer

    if (folder / "tokenizer_config.json").is_file():
        _refuse_own_code(read_json(folder / "tokenizer_config.json"), folder / "tokenizer_config.json")
    with told(f"{folder}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **SAFE)
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ValueError(f"{folder}: its tokenizer is a {type(tokenizer).__name__}; expected a fast one: save it with tokenizer.json")
    return tokenizer


def checked_kind(folder: Path) -> str:
    """The `model_type`, after what may be told from the names of files and the config alone."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no model directory (there is no {CONFIG}); expected one that transformers wrote")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which would be followed to another model; expected a whole model: merge it first"
        )
    config = read_json(folder / CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"{folder / CONFIG}: model_type is {kind!r}; expected a word such as llama")
    if kind.startswith(OURS):
        _register_own(kind)
    else:
        _refuse_own_code(config, folder / CONFIG)
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder / CONFIG}: model_type {kind!r} is none that transformers knows; expected one such as llama, qwen2, gemma"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{folder} holds quantised weights (quantization_config); expected plain ones: take the model's unquantised directory"
        )
    return kind


def _register_own(kind: str) -> None:
    """Let transformers know a type of ours: a plain one whose layers have widths of their own, or the model of the method it is named after."""
    method = kind.removeprefix(OURS)
    if method.isidentifier() and (Path(__file__).parents[1] / method / "model.py").is_file():
        importlib.import_module(f"fewer.language.{method}.model")
        return
    from fewer.language._shared import modeling_fewer

    modeling_fewer.register()


def _refuse_own_code(config: Mapping[str, Any], file: Path) -> None:
    if config.get("auto_map") is not None:
        raise ValueError(
            f"{file} asks for Python code of its own (auto_map), and no code of a model directory is run; "
            "expected a model of transformers' own classes: take auto_map out if they are meant"
        )


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """name -> shape of every weight, from the files' headers."""
    return {name: shape for file in weight_files(folder) for name, (shape, _) in stored_tensors(file).items()}


def weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has no weights as safetensors ({WEIGHTS}); expected them: save the model with transformers again")
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) and name == Path(name).name for name in named.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of file names; expected what transformers writes: save the model again")
    files = [folder / name for name in sorted(set(named.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{folder} lacks {', '.join(absent[:3])}, which {INDEX} names; copy the directory again")
    return files


def layers_in(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> set[int]:
    """How many layers the weights may be of; ValueError where the config names more than could be, before anything is made of them."""
    for name, value in _whole_numbers(read_json(folder / CONFIG)):
        if "layer" in name and value > max(ODD, len(shapes)):
            raise ValueError(
                f"{folder / CONFIG}: {name} is {value:.3g}, and there are {len(shapes)} weights; expected the config of these weights"
            )
    numbers: dict[str, set[str]] = {}
    for name in shapes:
        for found in re.finditer(r"\.(\d+)\.", f".{name}"):
            numbers.setdefault(f".{name}"[: found.start()], set()).add(found[1])
    return {len(each) for each in numbers.values()}


def _whole_numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _whole_numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= ODD:
            yield name, value


def _model(folder: Path, layers: set[int], dtype: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with told(f"{folder / CONFIG} cannot be used"):
        config = AutoConfig.from_pretrained(folder, **SAFE)
        config.return_dict = True
        count = config.get_text_config().num_hidden_layers
        if count not in layers:
            found = ", ".join(map(str, sorted(layers))) or "no"
            raise ValueError(f"it names {count} layers and the weights are of {found}; expected the config of these weights")
    with told(f"{folder} does not hold together"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **SAFE
        )
        model, about = loaded
        missing = sorted(about["missing_keys"])
        if missing:
            raise ValueError(
                f"the weights lack {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}; expected all of the model's"
            )
        with torch.no_grad():  # odd values may show only in a pass
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    return model


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever a library raises on odd values of a file becomes one line."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {_one_line(error)}; expected what transformers wrote: copy or write it again") from error


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 240 else f"{words[:240]}..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no reports of transformers: what matters of them is an error here."""
    import logging as levels

    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(levels.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
