"""Speculative decoding: a drafter proposes some tokens, the target reads them all in one pass and keeps those that it would have written.

With greedy decoding the text is the target's own, token by token; with sampling its distribution is the target's own (the rejection rule of
Leviathan et al. and Chen et al., 2023). A pass over n tokens reads each weight once, and of a sparse mixture only the experts in the union of theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from fewer.checks import check_positive, check_whole
from fewer.fitting import evaluating

LONGEST_MATCH = 3  # tokens that prompt lookup asks to have occurred before, at most
CACHE = "cache" if "cache" in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
Choose = Callable[[Float[Tensor, "n V"]], Float[Tensor, "n V"]]  # logits -> the distribution that is drawn from


@dataclass(frozen=True, eq=False)
class GenerateOutput:
    """What `speculative_generate` wrote, and how.

    Attributes:
        sequences: int64 [1, prompt + new tokens], as of `generate`.
        accepted: for each pass of the target, how many drafted tokens were kept; each pass adds one token of its own.
        drafted: for each pass, how many were proposed.
        union_shares: for each pass, the share of the experts that its tokens activate together, mean over layers; the first pass reads
            the prompt too. Empty where the target has no `feed_forwards` that say which experts are active.
    """

    sequences: Int64[Tensor, "1 T"]
    accepted: list[int]
    drafted: list[int]
    union_shares: list[float]

    @property
    def tokens_a_pass(self) -> float:
        """New tokens for each pass of the target (the paper's acceptance length): 1 is plain decoding."""
        return sum(self.accepted) / len(self.accepted) + 1


class Drafter(Protocol):
    """Proposes at most `count` tokens to follow, each with the distribution that it was drawn from (None: no draw, it is certain of it)."""

    def propose(self, tokens: Int64[Tensor, "T"], count: int) -> tuple[Int64[Tensor, "n"], Float[Tensor, "n V"] | None]: ...


class Reader:
    """A model with a cache of what it has read, which reads on from wherever a sequence leaves that."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, DynamicCache()
        self.read = torch.empty(0, dtype=torch.long, device=model.device)

    def logits(self, tokens: Int64[Tensor, "T"], last: int, **words: Any) -> tuple[Float[Tensor, "last V"], Any]:
        """(logits after each of the last tokens, the model's output)."""
        kept = min(_common(self.read, tokens), len(tokens) - last)
        if kept < len(self.read):
            self.cache.crop(kept - len(self.read))
        out = self.model(input_ids=tokens[None, kept:], use_cache=True, logits_to_keep=last, **{CACHE: self.cache}, **words)
        self.read = tokens
        return out.logits[0], out


def _common(a: Tensor, b: Tensor) -> int:
    """How many first tokens two sequences share."""
    shorter = min(len(a), len(b))
    return int((a[:shorter] == b[:shorter]).long().cumprod(0).sum())


class PromptLookup:
    """Proposes what followed when the last tokens occurred before: no second model."""

    def propose(self, tokens: Int64[Tensor, "T"], count: int) -> tuple[Int64[Tensor, "n"], None]:
        """
        >>> PromptLookup().propose(torch.tensor([5, 6, 7, 8, 5, 6]), 3)
        (tensor([7, 8, 5]), None)
        """
        for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
            places = (tokens[:-1].unfold(0, length, 1) == tokens[-length:]).all(1).nonzero().flatten()
            if len(places):
                enough = places[places + length + count <= len(tokens)]
                after = int(enough[-1] if len(enough) else places[0]) + length  # the latest that is followed by enough, else by most
                return tokens[after : after + count], None
        return tokens[:0], None


class DraftModel:
    """Proposes what a smaller model of the same tokens would write."""

    def __init__(self, model: Any, choose: Choose | None) -> None:
        self.reader, self.choose = Reader(model), choose

    def propose(self, tokens: Int64[Tensor, "T"], count: int) -> tuple[Int64[Tensor, "n"], Float[Tensor, "n V"] | None]:
        distributions: list[Tensor] = []
        start = len(tokens)
        for _ in range(count):
            logits, _out = self.reader.logits(tokens, 1)
            if self.choose is None:
                token = logits.argmax(-1)
            else:
                distributions.append(self.choose(logits))
                token = torch.multinomial(distributions[-1], 1)[0]
            tokens = torch.cat([tokens, token])
        return tokens[start:], torch.cat(distributions) if distributions else None


def accept_greedily(draft: Int64[Tensor, "n"], logits: Float[Tensor, "n+1 V"]) -> Int64[Tensor, "kept"]:
    """The drafted tokens that are the target's own choice, up to the first that is not, and the target's choice there."""
    best = logits.argmax(-1)
    kept = _common(draft, best)
    return torch.cat([draft[:kept], best[kept : kept + 1]])


def accept_by_rejection(
    draft: Int64[Tensor, "n"], drawn_from: Float[Tensor, "n V"] | None, target: Float[Tensor, "n+1 V"]
) -> Int64[Tensor, "kept"]:
    """Keep a token with probability min(1, p/q); at the first refusal draw from the rest, (p - q)+ normalised. What comes out is a draw from p.

    Args:
        drawn_from: q; None where each token was certain, q(token) = 1.
        target: p after each drafted token, and after the last.
    """
    places = torch.arange(len(draft), device=draft.device)
    p = target[places, draft].tolist()
    q = [1.0] * len(draft) if drawn_from is None else drawn_from[places, draft].tolist()
    for place, chance in enumerate(torch.rand(len(draft), dtype=torch.float64).tolist()):
        if chance * q[place] >= p[place]:
            drawn = torch.zeros_like(target[0]).index_fill_(0, draft[place], 1) if drawn_from is None else drawn_from[place]
            rest = (target[place] - drawn).clamp(min=0)
            return torch.cat([draft[:place], torch.multinomial(rest, 1)])
    return torch.cat([draft, torch.multinomial(target[len(draft)], 1)])


@torch.no_grad()
def speculative_generate(
    target: Any,
    draft: Any | Literal["ngram"],
    input_ids: Int64[Tensor, "1 T"],
    max_new_tokens: int,
    num_draft: int = 8,
    do_sample: bool = False,
    temperature: float = 1.0,
) -> GenerateOutput:
    """Write on after a prompt, losslessly, in fewer passes of the target.

    Args:
        target: any causal language model of transformers whose cache can be cut (no sliding window that forgets).
        draft: "ngram" (prompt lookup), or a smaller causal language model of the same tokens.
        input_ids: [1, T] the prompt.
        max_new_tokens: how many tokens to write at most; it ends earlier at the target's end of text.
        num_draft: how many tokens are proposed for each pass.
        do_sample: draw from the target's distribution (torch's own generator) in place of its likeliest token.
        temperature: of that distribution, and the draft model's.

    Raises:
        ValueError: a number out of range, more than one sequence, an empty prompt, or a draft model of another vocabulary.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> model, ids = micro_lm(), torch.tensor([[7, 8, 9, 7, 8]])
        >>> out = speculative_generate(model, "ngram", ids, 6)
        >>> out.sequences.tolist() == model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
        True
    """
    check_whole(max_new_tokens=max_new_tokens, num_draft=num_draft)
    check_positive(temperature=temperature)
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}; expected [1, T] with T >= 1: give one prompt at a time")
    choose: Choose | None = (lambda logits: torch.softmax(logits.double() / temperature, -1)) if do_sample else None
    models = [target] if draft == "ngram" else [target, draft]
    drafter = PromptLookup() if draft == "ngram" else _draft_model(target, draft, choose)
    ends = _ends(target)
    tokens, length = input_ids[0].to(target.device), input_ids.shape[1] + max_new_tokens
    reader, out = Reader(target), GenerateOutput(input_ids, [], [], [])
    with evaluating(*models):
        while len(tokens) < length and not (out.accepted and int(tokens[-1]) in ends):
            proposed, drawn_from = drafter.propose(tokens, min(num_draft, length - len(tokens) - 1))
            logits = _verify(reader, torch.cat([tokens, proposed]), len(proposed) + 1, out)
            kept = accept_greedily(proposed, logits) if choose is None else accept_by_rejection(proposed, drawn_from, choose(logits))
            kept = _up_to_end(kept, ends)
            out.drafted.append(len(proposed))
            out.accepted.append(len(kept) - 1)
            tokens = torch.cat([tokens, kept])
    return dataclasses.replace(out, sequences=tokens[None].to(input_ids.device))


def _verify(reader: Reader, tokens: Tensor, last: int, out: GenerateOutput) -> Tensor:
    """The target's logits after each of the last tokens, of one pass; of a sparse mixture the share of its experts is noted."""
    if not hasattr(reader.model, "feed_forwards"):
        return reader.logits(tokens, last)[0]
    logits, passed = reader.logits(tokens, last, output_router_logits=True)
    layers = zip(reader.model.feed_forwards(), passed.router_logits, strict=True)
    used = [layer.active(router_logits).flatten(0, 1).any(0).float().mean() for layer, router_logits in layers]
    out.union_shares.append(torch.stack(used).mean().item())
    return logits


def _draft_model(target: Any, draft: Any, choose: Choose | None) -> DraftModel:
    if isinstance(draft, str):
        raise ValueError(f"draft is {draft!r}; expected 'ngram' or a causal language model: load the model first")
    ours, theirs = target.config.vocab_size, draft.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"the draft model has {theirs} tokens and the target {ours}; expected one vocabulary: take a draft model of its family"
        )
    return DraftModel(draft, choose)


def _ends(model: Any) -> set[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _up_to_end(tokens: Tensor, ends: set[int]) -> Tensor:
    """The tokens up to the first that ends the text."""
    place = next((place for place, token in enumerate(tokens.tolist()) if token in ends), len(tokens))
    return tokens[: place + 1]
