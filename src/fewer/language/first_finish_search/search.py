"""First Finish Search with a transformers model, and what it is held against: voting, the last to finish, budget forcing, beam search."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewer.checks import check_whole
from fewer.language.first_finish_search.engine.races import Ends, Engine, Race
from fewer.language.first_finish_search.engine.sampling import LONGEST, RaceConfig
from fewer.language.first_finish_search.traces import FINISHED, AnswerFn, FFSResult, Trace, choose


def ffs_generate(
    model: Any,
    prompts: Any,
    tokenizer: Any = None,
    config: RaceConfig | None = None,
    *,
    answer_fn: AnswerFn | None = None,
    streamer: Any = None,
    **words: Any,
) -> list[FFSResult]:
    """Sample n traces of each prompt side by side; as soon as k have finished, stop the others and answer.

    A prompt is passed through the model once, at batch 1. As soon as it has its answer its rows leave the model and the next prompt's come.

    Args:
        model: a causal language model of transformers (or peft). It samples in eval mode, and gets its mode back.
        prompts: a text, a list of messages (`{"role": ..., "content": ...}`), token ids [T], several of these in a list, or what a
            tokenizer makes of several, with its attention_mask.
        tokenizer: its fast tokenizer; needed for texts, prefixes, stop strings and answers.
        config: how they are raced; `words` (n=4, k=1, max_new_tokens=512, temperature=0.6, top_p=0.95, seed=0, ...) say it otherwise.
        answer_fn: the answer that a text gives, or None where it gives none; needed where several vote (k > 1).
        streamer: gets the winner's tokens when the race is over (one prompt only).

    Returns:
        A result for each prompt, in their order.

    Raises:
        ValueError: settings that cannot be, an empty prompt, one that leaves no room for max_new_tokens, no end token, no answer_fn for
            a vote.

    Source: arXiv 2505.18149, algorithm 1; FFS-k@n: arXiv 2512.02008.

    Examples:
        >>> from fewer.tasks import micro_lm
        >>> results = ffs_generate(micro_lm(), [torch.arange(3), torch.arange(5)], n=2, max_new_tokens=4, seed=3)
        >>> [(result.finished, result.total_tokens) for result in results]
        [(False, 8), (False, 8)]
    """
    chosen, *_ = _chosen(config, words)
    return _search(model, prompts, tokenizer, chosen, answer_fn, streamer, wait=chosen.k)


def majority_vote(model: Any, prompts: Any, tokenizer: Any, config: RaceConfig | None = None, **words: Any) -> list[FFSResult]:
    """The most frequent parsed answer of n whole samples; a tie goes to the briefest trace. As `ffs_generate`, with k = n."""
    chosen, answer_fn, streamer = _chosen(config, words)
    return _search(model, prompts, tokenizer, dataclasses.replace(chosen, k=chosen.n), answer_fn, streamer, wait=chosen.n)


def last_finish(model: Any, prompts: Any, tokenizer: Any = None, config: RaceConfig | None = None, **words: Any) -> list[FFSResult]:
    """Last Finish Search, the control: all n samples run to their end and the k longest of those that finished vote."""
    chosen, answer_fn, streamer = _chosen(config, words)
    return _search(model, prompts, tokenizer, chosen, answer_fn, streamer, wait=chosen.n, longest=True)


def budget_forcing(
    model: Any,
    prompts: Any,
    tokenizer: Any,
    config: RaceConfig | None = None,
    *,
    continuation: str = "Wait",
    num_forced: int = 1,
    before: Sequence[int] = (),
    **words: Any,
) -> list[FFSResult]:
    """One sample that may not end yet: the first `num_forced` times that it would, `continuation` is written in place of the end.

    Args:
        before: tokens that are taken for a wish to end too, such as the tag that closes the thinking part.
    """
    check_whole(num_forced=num_forced)
    chosen, answer_fn, streamer = _chosen(config, words | {"n": 1, "k": 1})
    written = tuple(tokenizer(continuation, add_special_tokens=False).input_ids)
    if not written:
        raise ValueError(f"continuation is {continuation!r}, which is no token; expected words to write in place of an end, such as 'Wait'")
    forcing = {"continuation": written, "times": num_forced, "before": frozenset(before)}
    return _search(model, prompts, tokenizer, chosen, answer_fn, streamer, wait=1, forcing=forcing)


def beam(
    model: Any, prompts: Any, tokenizer: Any = None, config: RaceConfig | None = None, *, length_penalty: float = 1.0, **words: Any
) -> list[FFSResult]:
    """Beam search of width n by transformers; its tokens are counted as the answer's length, and n times that.

    Args:
        length_penalty: the power of the length that a beam's log-probability is divided by; 0 leaves it alone.
    """
    chosen, answer_fn, streamer = _chosen(config, {"temperature": 1.0} | words)
    given_rows = _checked_rows(model, prompts, tokenizer, answer_fn, streamer)
    results = []
    for ids in given_rows:
        ends, longest = ends_of(model, tokenizer, chosen), room(model, len(ids), chosen)
        given = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
        start = time.perf_counter()
        with _sampling_from(model):
            made = model.generate(
                given, attention_mask=torch.ones_like(given), num_beams=chosen.n, do_sample=False, temperature=None, top_p=None, top_k=None,
                length_penalty=length_penalty, max_new_tokens=longest, min_new_tokens=chosen.min_new_tokens or None, tokenizer=tokenizer,
                eos_token_id=sorted(ends.token_ids) or None, pad_token_id=min(ends.token_ids, default=0), stop_strings=list(ends.strings) or None,
            )[0, len(ids) :].tolist()  # fmt: skip
        finished = len(made) < longest or made[-1] in ends.token_ids
        text = tokenizer.decode(made, skip_special_tokens=True) if tokenizer else ""
        trace = Trace(text, tuple(made), len(made), float("nan"), FINISHED if finished else "length")
        answer = answer_fn(text) if answer_fn else None
        cost = (len(made), chosen.n * len(made), chosen.n * len(ids), time.perf_counter() - start)  # each beam reads the prompt
        results.append(FFSResult(text, trace.token_ids, trace.finished, 0, *cost, (trace,), answer))
    if streamer is not None:
        _stream(streamer, given_rows[0], results[0])
    return results


def _search(
    model: Any,
    prompts: Any,
    tokenizer: Any,
    config: RaceConfig,
    answer_fn: AnswerFn | None,
    streamer: Any,
    *,
    wait: int,
    longest: bool = False,
    forcing: Mapping[str, Any] | None = None,
) -> list[FFSResult]:
    """Races for all prompts, as many at a time as there is room for."""
    if config.k > 1 and answer_fn is None:
        raise ValueError(f"k is {config.k} and there is no answer_fn; expected one, as parsed answers vote: give answer_fn=..., or k=1")
    ends = dataclasses.replace(ends_of(model, tokenizer, config), **forcing or {})
    openings = [tokenizer(text, add_special_tokens=False).input_ids for text in config.prefixes] if config.prefixes else []
    given = _checked_rows(model, prompts, tokenizer, answer_fn, streamer)
    lengths = [room(model, len(ids) + max(map(len, openings), default=0), config) for ids in given]
    waiting = deque(enumerate(given))
    results: dict[int, FFSResult] = {}
    engine = Engine(model)
    with _sampling_from(model):
        while waiting or engine.rows:
            while waiting and len(engine.rows) + config.n <= config.max_rows:
                number, ids = waiting.popleft()
                engine.admit(Race(ids, config, ends, prompt=number, wait=wait, longest=lengths[number], openings=openings))
            for race in engine.step():
                results[race.prompt] = _result(race, tokenizer, config.k, answer_fn, longest)
    if streamer is not None:
        _stream(streamer, given[0], results[0])
    return [results[number] for number in range(len(given))]


def _result(race: Race, tokenizer: Any, k: int, answer_fn: AnswerFn | None, longest: bool) -> FFSResult:
    traces = race.traces(tokenizer)
    row, answer = choose(traces, race.order(), k, answer_fn, longest)
    won, lengths = traces[row], [trace.tokens for trace in traces]
    cost = (max(lengths), sum(lengths), race.prefilled, race.seconds)  # those that were stopped came as far as the one that ended it
    return FFSResult(won.text, won.token_ids, won.finished, row, *cost, tuple(traces), answer)


def _stream(streamer: Any, ids: Sequence[int], result: FFSResult) -> None:
    streamer.put(torch.tensor([ids]))
    for token in result.token_ids:
        streamer.put(torch.tensor([token]))
    streamer.end()


def _chosen(config: RaceConfig | None, words: dict[str, Any]) -> tuple[RaceConfig, AnswerFn | None, Any]:
    """The settings of a race, and from the same words who reads its answers and who is streamed to."""
    answer_fn, streamer = words.pop("answer_fn", None), words.pop("streamer", None)
    known = [field.name for field in dataclasses.fields(RaceConfig)]
    for word in words:
        if word not in known:
            raise TypeError(f"{word} is no setting of a race; expected one of {', '.join(known)}")
    return dataclasses.replace(config or RaceConfig(), **words), answer_fn, streamer


@contextlib.contextmanager
def _sampling_from(model: Any) -> Iterator[None]:
    """The model in eval mode without gradients inside the block."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _checked_rows(model: Any, prompts: Any, tokenizer: Any, answer_fn: AnswerFn | None, streamer: Any) -> list[list[int]]:
    """The tokens of each prompt, once it is sure that they can be answered."""
    if answer_fn is not None and tokenizer is None:
        raise ValueError("answer_fn is given and no tokenizer; expected both, as answers are read from text: give tokenizer=...")
    given = token_rows(prompts, tokenizer)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} has an encoder; expected a causal language model, whose prompt its samples go on from")
    if streamer is not None and len(given) > 1:
        raise ValueError(f"streamer is given and {len(given)} prompts; expected one prompt: leave it out, or call once a prompt")
    return given


def token_rows(prompts: Any, tokenizer: Any) -> list[list[int]]:
    """The tokens of each prompt, whatever form they are given in."""
    if isinstance(prompts, Mapping):
        ids, mask = prompts["input_ids"], prompts.get("attention_mask")
        if mask is None:
            return token_rows(ids, tokenizer)
        if len(ids) and torch.as_tensor(ids[0]).dim() == 0:  # one text's
            ids, mask = [ids], [mask]
        prompts = [torch.as_tensor(row)[torch.as_tensor(kept).bool()] for row, kept in zip(ids, mask, strict=True)]
    if isinstance(prompts, Tensor) and prompts.dim() == 2:
        if len(prompts) > 1:
            raise ValueError(
                f"prompts are a tensor of {len(prompts)} rows without padding information; expected the tokenizer's whole output, with "
                "attention_mask, or a list of rows"
            )
        prompts = list(prompts)
    if len(prompts) == 0:
        raise ValueError("there are no prompts; expected at least one: give texts or token ids")
    one = isinstance(prompts, str | Tensor) or (isinstance(prompts, Sequence) and isinstance(prompts[0], int | dict))
    rows = [_tokens(prompt, tokenizer) for prompt in ([prompts] if one else prompts)]
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {number} is empty; expected at least one token: give a text or token ids")
    return rows


def _tokens(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, Tensor):
        return prompt.reshape(-1).tolist()
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], dict)):
        if tokenizer is None:
            raise ValueError("prompts are texts and there is no tokenizer; expected one: give tokenizer=..., or token ids")
        if isinstance(prompt, str):
            return list(tokenizer(prompt).input_ids)
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
    return [int(token) for token in prompt]


def ends_of(model: Any, tokenizer: Any, config: RaceConfig) -> Ends:
    """The end tokens of the model's generation config (else of its config, else of the tokenizer) with those of the race."""
    places = (getattr(model, "generation_config", None), model.config, tokenizer)
    named = next((found for place in places if (found := getattr(place, "eos_token_id", None)) is not None), ())
    tokens = frozenset([named] if isinstance(named, int) else named) | frozenset(config.stop_token_ids)
    if not tokens and not config.stop_strings:
        raise ValueError("neither model nor tokenizer names an end token; expected what ends a sample: give stop_token_ids or stop_strings")
    if (config.stop_strings or config.prefixes) and tokenizer is None:
        raise ValueError("stop_strings or prefixes are given and no tokenizer; expected one to read and write them: give tokenizer=...")
    if config.stop_strings and not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"stop_strings need a fast tokenizer; this is a {type(tokenizer).__name__}: load it with AutoTokenizer")
    return Ends(tokens, config.stop_strings, tokenizer)


def room(model: Any, prompt: int, config: RaceConfig) -> int:
    """The most new tokens of a prompt of so many; ValueError where the model's positions do not take what is asked for."""
    text_config = model.config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or prompt + LONGEST
    longest = config.max_new_tokens or min(LONGEST, positions - prompt)
    if prompt + longest > positions or longest <= config.min_new_tokens:
        raise ValueError(
            f"a prompt of {prompt} tokens and {max(longest, 1)} new ones are given; expected at most {positions} together, the model's "
            "positions: shorten the prompt, or lower max_new_tokens or min_new_tokens"
        )
    return longest
