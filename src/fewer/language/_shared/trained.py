"""What the studies of trained models begin from: a directory (the small language model's, or the user's), text to use and text it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewer.inputs import read_pairs
from fewer.language._shared.model_directory import load_directory
from fewer.tasks import fetch_small_lm, open_lm
from fewer.tasks.language_corpus import Corpus, token_stream
from fewer.tasks.lm_training import check_window
from fewer.tasks.small_lm import corpus_of

TEXT_HELP = "a UTF-8 text file to use and judge on, in place of the standard library's Python"
STEPS_HELP = "training steps; 0: as many as the scale takes"
HELD_OUT_HELP = "tokens that models are judged on; 0: as many as the scale takes"
DATA_HELP = "a JSONL file of prompt and completion to use and judge on, the last tenth of it held out"


@dataclass(frozen=True)
class Trained:
    """A trained model's directory, and int64 tokens of both parts of a text.

    Attributes:
        about: which model it is, and how well it predicts.
        dense: a pruned model is refused.
    """

    folder: Path
    train: Tensor
    validation: Tensor
    about: str
    dense: bool = True

    def model(self, device: str) -> Any:
        """The model in float32 and eval mode."""
        return load_directory(self.folder, "float32", dense=self.dense)[0].to(device)


def trained(model: str, text: str, data: str, *, window: int, dense: bool = True) -> Trained:
    """The small language model (trained once, cached) and Python, or a user's directory, text or pairs in place of them.

    Raises:
        ValueError: no such directory, a model that is pruned or cut already where it is to be dense, a part of the text of less than one window.
    """
    corpus = corpus_of_pairs(data) if data else corpus_of([text] if text else [])
    if model:
        tokenizer = load_directory(model, dense=dense)[1]
        found = Trained(Path(model), token_stream(tokenizer, corpus.train), token_stream(tokenizer, corpus.validation), model, dense)
    else:
        lm = open_lm(fetch_small_lm(text=[text] if text else []), corpus)
        about = f"{lm.key}, trained to a validation loss of {lm.about['validation_loss']:.3f}"
        found = Trained(lm.folder, lm.train, lm.validation, about)
    for part in (found.train, found.validation):
        check_window(part, window)
    return found


def corpus_of_pairs(data: str) -> Corpus:
    """Prompts with their completions as documents, the last tenth held out; ValueError where there are fewer than two."""
    rows = tuple((str(number), prompt + completion) for number, (prompt, completion) in enumerate(read_pairs(data)))
    if len(rows) < 2:
        raise ValueError(f"{data} holds {len(rows)} examples; expected at least 2, to learn from and to judge by")
    held = max(1, len(rows) // 10)
    return Corpus(rows[:-held], rows[-held:], data)
