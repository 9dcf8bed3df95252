"""A small Llama-like language model, trained from scratch on real text on this machine, once: what studies of language models work on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewer.data.fetching import cache_folder
from fewer.data.made_once import folder_of, made_once
from fewer.errors import UserError
from fewer.files import discard, whole_file
from fewer.tasks.language_corpus import END, VOCABULARY, Corpus, standard_library, text_corpus, token_stream, train_tokenizer
from fewer.tasks.lm_training import Recipe, token_loss, train

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # of all that is not in the recipe: raise it when the code trains another model from the same settings
HELD_OUT = 24_000  # validation tokens that the loss is taken on

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Preset:
    """A model's shape and how it is trained (None: not at all)."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    recipe: Recipe | None
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    def model(self, seed: int = 0) -> Any:
        """The model with random weights (deviation 0.02), float32."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {name: value for name, value in asdict(self).items() if name not in ("name", "recipe", "rope_theta")}
        config = LlamaConfig(
            **shape,
            vocab_size=VOCABULARY,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue] - taken by the base class
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("family-s", 192, 8, 512, 3, 1, Recipe()),  # 3.54 million parameters
        Preset("family-xs", 128, 2, 384, 4, 4, Recipe(steps=300, batch=16, window=64, lr=3e-3, warm_up=20)),
        Preset("family-micro", 64, 4, 128, 2, 1, None),  # for tests: random weights
    )
}


@dataclass(frozen=True)
class SmallLM:
    """The model with what it was trained on.

    Attributes:
        model: a LlamaForCausalLM in eval mode, float32.
        tokenizer: its fast tokenizer.
        train, validation: int64 tokens of the two parts of the corpus, documents one after the other.
        folder: where it is kept, a directory that `from_pretrained` takes.
        about: `train.json`: validation loss (nats a token), loss curve, tokens, seconds, versions.
    """

    model: Any
    tokenizer: Any
    train: Tensor
    validation: Tensor
    folder: Path
    about: dict[str, Any] = field(repr=False)

    @property
    def key(self) -> str:
        """The name of its folder: preset and hash of all that went into it."""
        return self.folder.name


def corpus_of(text: Sequence[Path | str] = ()) -> Corpus:
    """The named files, or the interpreter's standard library where none is named."""
    return text_corpus(text) if text else standard_library()


def preset_of(name: str) -> Preset:
    """The preset of that name; UserError on an unknown one."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def lm_folder(preset: Preset, corpus: Corpus, recipe: Recipe | None) -> Path:
    """Where the model of a preset, a recipe and a corpus is kept, whether or not it is there."""
    what = {
        "version": VERSION,
        "preset": asdict(preset) | {"recipe": None},
        "recipe": asdict(recipe) if recipe else None,
        "corpus": corpus.digest,
        "tokenizer": {"kind": "byte-level BPE", "vocabulary": VOCABULARY, "special": [END]},
    }
    return folder_of("lm", preset.name, what)


def fetch_small_lm(
    preset: str = "family-s", *, steps: int | None = None, text: Sequence[Path | str] = (), tell: Tell | None = None
) -> Path:
    """The folder of a small language model, which is trained first where it is not there yet (about 13 minutes on two idle cores).

    Broken off, training goes on from its last 200 steps. Several processes that ask at once train it once.

    Args:
        preset: "family-s", "family-xs" (2 layers, half a minute), or "family-micro" (random weights, at once).
        steps: training steps in place of the recipe's 1,200; the result is kept apart from the whole one.
        text: UTF-8 files to train on in place of the interpreter's standard library.
        tell: called with (step, steps, words) as training goes on.

    Raises:
        UserError: an unknown preset, steps below 1, texts that cannot be read.
    """
    return _fetch(preset, steps, corpus_of(text), tell)


def _fetch(preset: str, steps: int | None, corpus: Corpus, tell: Tell | None) -> Path:
    chosen = preset_of(preset)
    recipe = chosen.recipe.of_length(steps) if chosen.recipe else None
    folder = lm_folder(chosen, corpus, recipe)
    return made_once(folder, lambda part: _make(chosen, corpus, recipe, part, tell or (lambda step, steps, words: None)))


def load_small_lm(
    preset: str = "family-s", *, steps: int | None = None, text: Sequence[Path | str] = (), tell: Tell | None = None
) -> SmallLM:
    """The small language model, loaded with its tokens (see `fetch_small_lm`)."""
    corpus = corpus_of(text)
    return open_lm(_fetch(preset, steps, corpus, tell), corpus)


def open_lm(folder: Path, corpus: Corpus) -> SmallLM:
    """Any Llama directory with a tokenizer, and a corpus in its tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", use_safetensors=True, **safe).eval()
    about = json.loads((folder / "train.json").read_text()) if (folder / "train.json").exists() else {}
    return SmallLM(model, tokenizer, *_streams(folder, tokenizer, corpus), folder, about)


def micro_lm(seed: int = 0) -> Any:
    """A LlamaForCausalLM of 4 small layers with random weights, for tests: no text is read and nothing is trained.

    Examples:
        >>> micro_lm().config.intermediate_size
        128
    """
    return PRESETS["family-micro"].model(seed).eval()


def _make(preset: Preset, corpus: Corpus, recipe: Recipe | None, folder: Path, tell: Tell) -> None:
    """Tokenizer, tokens, model, and how it came about."""
    import torch

    tell(0, 1, "the tokenizer learns")
    tokenizer = train_tokenizer(corpus)
    tokenizer.save_pretrained(folder)
    streams = _streams(folder, tokenizer, corpus)
    model = preset.model()
    about: dict[str, Any] = {"corpus": corpus.origin, "tokens": [len(stream) for stream in streams], "torch": torch.__version__}
    if recipe:
        about |= train(model, streams[0], recipe, folder / "checkpoint", tell)
    about["validation_loss"] = token_loss(model, streams[1][:HELD_OUT])
    model.save_pretrained(folder)
    (folder / "train.json").write_text(json.dumps(about, indent=1))
    discard(folder / "checkpoint")


def _streams(folder: Path, tokenizer: Any, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """The tokens of both parts, kept beside the model so that they are made once."""
    from safetensors.torch import load_file, save_file

    file = folder / f"tokens-{corpus.digest[:16]}.safetensors"
    if file.exists():
        kept = load_file(file)
        return kept["train"], kept["validation"]
    streams = token_stream(tokenizer, corpus.train), token_stream(tokenizer, corpus.validation)
    if folder.is_relative_to(cache_folder()):
        with whole_file(file, overwrite=True) as part:
            save_file({"train": streams[0], "validation": streams[1]}, part)
    return streams
