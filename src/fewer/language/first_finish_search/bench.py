"""Races against transformers' own generate, several samples in a batch that is stopped at its first end; and what a step of four rows takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fewer.language._shared.model_directory import load_directory
from fewer.language.first_finish_search.engine.races import Ends, Engine, Race
from fewer.language.first_finish_search.engine.sampling import RaceConfig
from fewer.language.first_finish_search.problems import fetch_reasoner, sums
from fewer.language.first_finish_search.search import ffs_generate, majority_vote
from fewer.study import Bench

bench = Bench("first-finish-search")
N, PROMPTS, STEPS = 4, 64, 24
FREE: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
Work = Callable[[], object]


def stopped_generate(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[torch.Tensor]:
    """The peer: `generate` with num_return_sequences=4, ended for all rows as soon as one has ended, a prompt after the other."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class FirstFinish(StoppingCriteria):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
            ended = (input_ids[:, -1] == model.config.eos_token_id).any()
            return ended.expand(len(input_ids))  # pyright: ignore[reportReturnType]

    made = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made.append(
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=N, top_k=0, max_new_tokens=200,
                stopping_criteria=StoppingCriteriaList([FirstFinish()]), **FREE,
            )
        )  # fmt: skip
    return made


def _against_generate(prompts: int) -> tuple[Work, Work]:
    model, tokenizer = load_directory(fetch_reasoner())
    asked = [prompt for prompt, _ in sums(4, prompts, seed=2)]
    return (
        lambda: ffs_generate(model, asked, tokenizer, n=N, max_new_tokens=200, **FREE),
        lambda: stopped_generate(model, tokenizer, asked),
    )


@bench.race("one prompt, 4 samples, the small reasoner", peer="transformers' generate, stopped at the first end", reach=1.0)
def one_prompt() -> tuple[Work, Work]:
    return _against_generate(1)


@bench.race("64 prompts, 4 samples each, the small reasoner", peer="transformers' generate, stopped at the first end", reach=1 / 1.5)
def many_prompts() -> tuple[Work, Work]:
    return _against_generate(PROMPTS)


@bench.quantity("tokens in all for 64 prompts", peer="a vote of 4 whole samples", unit="tokens", reach=1.0)
def tokens() -> tuple[float, float]:
    model, tokenizer = load_directory(fetch_reasoner())
    asked = [prompt for prompt, _ in sums(4, PROMPTS, seed=2)]
    ours = ffs_generate(model, asked, tokenizer, n=N, **FREE)
    theirs = majority_vote(model, asked, tokenizer, n=N, answer_fn=str, **FREE)
    return sum(result.total_tokens for result in ours), sum(result.total_tokens for result in theirs)


@bench.race("24 steps of 4 rows, random Llama of width 1,024", peer="24 steps of one row", reach=2.0)
def four_rows() -> tuple[Work, Work]:
    """Decoding reads all weights once a step, for one row or for four."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16)
    model = LlamaForCausalLM(config).eval()

    @torch.no_grad()
    def steps(rows: int) -> None:
        engine = Engine(model)
        engine.admit(Race(range(32), RaceConfig(n=rows, **FREE), Ends(frozenset([0])), wait=rows, longest=STEPS))
        while engine.rows:
            engine.step()

    return lambda: steps(N), lambda: steps(1)
