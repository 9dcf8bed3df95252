"""Writing on after a prompt as the verbs do: the user's words alone decide how, none of a model directory's own settings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from fewer.language._shared.model_directory import load_directory
from fewer.language._shared.speculative import speculative_generate


@dataclass(frozen=True)
class Written:
    """A text that a model wrote.

    Attributes:
        tokens: how many were written, the end of text with them.
        seconds: wall-clock seconds, the prompt's pass with them.
        tokens_a_pass: how many each pass of the model gave, where drafts were verified.
    """

    prompt: str
    completion: str
    tokens: int
    seconds: float
    tokens_a_pass: float | None = None

    @property
    def speed(self) -> str:
        """How fast it was, in words."""
        passes = f" ({self.tokens_a_pass:.2f} a pass)" if self.tokens_a_pass else ""
        return f"{self.tokens} tokens in {self.seconds:.2f} s, {self.tokens / self.seconds:.1f} a second{passes}"


def settings(model: Any, tokens: int, sample: bool = False, temperature: float = 1.0) -> Any:
    """transformers' generation settings: greedy or plain sampling, at most so many tokens, ended by the model's own end of text."""
    from transformers import GenerationConfig

    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else model.config.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else (ends[0] if isinstance(ends, list) else ends)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if sample else {"do_sample": False}
    return GenerationConfig(max_new_tokens=tokens, eos_token_id=ends, pad_token_id=pad, bos_token_id=own.bos_token_id, **drawn)


def write_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    tokens: int,
    *,
    draft: str | None = None,
    sample: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
    **words: Any,
) -> Written:
    """Let a model write on after a prompt.

    Args:
        tokens: how many at most.
        draft: "ngram" or the directory of a smaller model, whose proposals are verified (`speculative_generate`).
        words: what `generate` is given besides, such as an assistant model.

    Raises:
        ValueError: the prompt has no tokens, or a draft model has others.
    """
    drafter = _open_draft(draft, tokenizer, model.device)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if not ids.numel():
        raise ValueError("--prompt is empty; expected text to go on from: give some")
    torch.manual_seed(seed)
    how, gained = settings(model, tokens, sample, temperature), None
    start = time.perf_counter()
    if drafter is not None:
        out = speculative_generate(model, drafter, ids.long(), tokens, do_sample=sample, temperature=temperature)
        written, gained = out.sequences, out.tokens_a_pass
    else:
        written = model.generate(ids.long(), attention_mask=torch.ones_like(ids), generation_config=how, **words)
    seconds = time.perf_counter() - start
    new = written[0, ids.shape[1] :]
    return Written(prompt, tokenizer.decode(new, skip_special_tokens=True), len(new), seconds, gained)


def _open_draft(draft: str | None, tokenizer: Any, device: Any) -> Any:
    """What is named: nothing, "ngram", or the model of a directory, whose tokens must be the tokenizer's (ValueError)."""
    if draft is None or draft == "ngram":
        return draft
    model, other = load_directory(draft)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the draft {draft} has other tokens than the model; expected one vocabulary: take a smaller model of its family")
    return model.to(device)
