"""Models that a study trains from scratch: one recipe, the same windows in the same order for all arms of a seed, real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewer.fitting import fit_steps
from fewer.language._shared.model_directory import load_directory
from fewer.tasks import load_small_lm
from fewer.tasks.language_corpus import token_stream
from fewer.tasks.lm_training import Recipe, check_window, optimizer_of, windows
from fewer.tasks.small_lm import corpus_of

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
MODEL_HELP = "a model directory that gives tokenizer and sizes, in place of the small ones (trained from scratch all the same)"
TEXT_HELP = "a UTF-8 text file to learn, its end held out, in place of the standard library's Python"


@dataclass(frozen=True)
class Ground:
    """What all arms begin from.

    Attributes:
        train, validation: int64 tokens.
        sizes: words for a LlamaConfig, vocabulary and special tokens among them.
    """

    train: Tensor
    validation: Tensor
    tokenizer: Any
    sizes: dict[str, Any]


def ground(model: str = "", text: str = "", *, window: int = 128) -> Ground:
    """Text in the small language model's tokens, or a directory's, and the sizes of what is trained on it.

    Raises:
        ValueError: no such directory, or a text of less than one window.
    """
    corpus = corpus_of([text] if text else [])
    if model:
        given, tokenizer = load_directory(model)
        sizes = {name: getattr(given.config, name) for name in SIZES}
        train, validation = token_stream(tokenizer, corpus.train), token_stream(tokenizer, corpus.validation)
        special = {name: getattr(given.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes |= {"vocab_size": given.config.vocab_size, **special}
    else:
        lm = load_small_lm("family-micro", text=[text] if text else [])
        tokenizer, train, validation = lm.tokenizer, lm.train, lm.validation
        sizes = SIZES | {"vocab_size": lm.model.config.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    for part in (train, validation):
        check_window(part, window)
    return Ground(train, validation, tokenizer, sizes | {"tie_word_embeddings": True, "max_position_embeddings": 512})


def pretrain(
    model: nn.Module,
    tokens: Tensor,
    recipe: Recipe,
    *,
    loss_of: Callable[[Any], Tensor] | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train all of a model by a recipe (AdamW, warm-up, cosine, clipped); it is left in eval mode.

    Args:
        loss_of: window ids [batch, window] -> the loss; by default the model's own for these labels.
        tell: called with the step (from 1) and its loss.

    Returns:
        the loss of each step.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    device = next(model.parameters()).device
    own = loss_of or (lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss)
    batches = (windows(tokens, recipe, step).to(device) for step in range(recipe.steps))
    model.train()
    try:
        return fit_steps(
            optimizer_of(model, recipe),
            own,
            batches,
            recipe.steps,
            schedule=lambda step: recipe.lr_at(step) / recipe.lr,
            clip=recipe.max_norm,
            tell=tell,
        )
    finally:
        model.eval()
