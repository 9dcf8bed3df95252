"""Speculative decoding loses nothing: greedy text token by token, and sampled text in distribution."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from block_ffn_models import IDS, make
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from fewer.language import speculative_generate
from fewer.language._shared.speculative import PromptLookup, accept_by_rejection, accept_greedily

# Prompts that say things twice, so that a look-up finds something
PROMPTS = [torch.cat([row, row[:3]])[None] for row in torch.randint(2, 48, (50, 6), generator=torch.Generator().manual_seed(3))]


def smaller(seed=7):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).double().eval()


def greedy(model, prompts, tokens):
    """Plain greedy decoding by transformers: the texts, and the least margin by which a token won (one pass over the whole tells it)."""
    words = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(prompts, **words)
    best = model(whole).logits[:, prompts.shape[1] - 1 : -1].topk(2).values
    texts = []
    for row in whole.tolist():
        new = row[prompts.shape[1] :]
        end = model.generation_config.eos_token_id
        texts.append(row[: prompts.shape[1]] + (new[: new.index(end) + 1] if end in new else new))
    return texts, (best[..., 0] - best[..., 1]).min().item()


@torch.no_grad()
@pytest.mark.parametrize(("drafter", "many", "tokens"), [("ngram", 50, 64), ("a model near it", 4, 32), ("itself", 4, 32)])
def test_greedy_text_is_the_targets_own(drafter, many, tokens):
    model = make(torch.float64, kernel="union", num_hidden_layers=1)
    near = copy.deepcopy(model)
    for weight in near.parameters():
        weight += 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(4), dtype=weight.dtype)
    draft = {"ngram": "ngram", "a model near it": near, "itself": model}[drafter]
    texts, margin = greedy(model, torch.cat(PROMPTS[:many]), tokens)
    assert margin > 1e-9  # no tie that rounding could turn
    kept = []
    for prompt, wanted in zip(PROMPTS, texts, strict=False):
        out = speculative_generate(model, draft, prompt, tokens)
        assert out.sequences[0].tolist() == wanted
        assert sum(out.accepted) + len(out.accepted) == len(wanted) - prompt.shape[1]
        assert len(out.union_shares) == len(out.accepted) == len(out.drafted)
        assert all(0 <= share <= 1 for share in out.union_shares)
        kept.append(out.tokens_a_pass)
    low, high = {"ngram": (1, 9), "a model near it": (1, 7), "itself": (7, 9)}[drafter]
    assert low < max(kept) <= high


def test_sampled_pairs_of_tokens_have_the_targets_distribution():
    """Chi-square of 20,000 draws of two tokens against exact probabilities, and of 5,000 with a drafter that is certain."""
    draw = torch.Generator().manual_seed(0)
    first = torch.softmax(torch.randn(5, generator=draw, dtype=torch.float64), 0)
    second = torch.softmax(torch.randn(5, 5, generator=draw, dtype=torch.float64), 1)
    q_first = torch.softmax(torch.randn(5, generator=draw, dtype=torch.float64), 0)
    q_second = torch.softmax(torch.randn(5, 5, generator=draw, dtype=torch.float64), 1)
    exact = (first[:, None] * second).flatten()
    for certain, draws in ((True, 5_000), (False, 20_000)):
        torch.manual_seed(1)
        counts = torch.zeros(25)
        for _ in range(draws):
            if certain:
                draft, q = torch.tensor([2, 3]), None
            else:
                one = torch.multinomial(q_first, 1)
                draft = torch.cat([one, torch.multinomial(q_second[one[0]], 1)])
                q = torch.stack([q_first, q_second[one[0]]])
            p = torch.stack([first, second[draft[0]], first])
            kept = accept_by_rejection(draft, q, p)
            pair = kept[:2] if len(kept) > 1 else torch.cat([kept, torch.multinomial(second[kept[0]], 1)])
            counts[pair[0] * 5 + pair[1]] += 1
        assert chisquare(counts.numpy(), (exact * draws).numpy()).pvalue > 1e-3, certain


@pytest.mark.parametrize(("draft", "draws"), [("ngram", 100), ("model", 100)])
def test_sampling_end_to_end_has_the_targets_distribution(draft, draws):
    model = make(torch.float64, vocab_size=6, initializer_range=0.5, eos_token_id=None)
    torch.manual_seed(5)
    sizes = {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    other = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5, eos_token_id=None)).double().eval()
    prompt = torch.tensor([[2, 3, 4, 2, 3]])
    with torch.no_grad():
        first = torch.softmax(model(prompt).logits[0, -1] / 0.8, -1)
        following = torch.stack([model(torch.cat([prompt, torch.tensor([[token]])], 1)).logits[0, -1] for token in range(6)])
    exact = (first[:, None] * torch.softmax(following / 0.8, -1)).flatten()
    counts = torch.zeros(36)
    torch.manual_seed(0)
    for _ in range(draws):
        out = speculative_generate(model, "ngram" if draft == "ngram" else other, prompt, 2, num_draft=2, do_sample=True, temperature=0.8)
        pair = out.sequences[0, -2:]
        counts[pair[0] * 6 + pair[1]] += 1
    many = exact * draws >= 5
    found = torch.cat([counts[many], counts[~many].sum()[None]])
    wanted = torch.cat([exact[many], exact[~many].sum()[None]]) * draws
    kept = wanted > 0
    assert chisquare(found[kept].numpy(), wanted[kept].numpy()).pvalue > 1e-3


def test_what_is_accepted_greedily():
    logits = torch.eye(5)[[1, 2, 3, 4]]
    for draft, kept in [([1, 2, 3], [1, 2, 3, 4]), ([1, 0, 3], [1, 2]), ([0, 2, 3], [1]), ([1, 2], [1, 2, 3])]:
        assert accept_greedily(torch.tensor(draft, dtype=torch.long), logits[: len(draft) + 1]).tolist() == kept


def test_prompt_lookup_takes_the_longest_match_and_the_latest_that_says_enough():
    def after(*tokens, count=2):
        return PromptLookup().propose(torch.tensor(tokens), count)[0].tolist()

    assert after(1, 2, 3, 9, 1, 2, 3) == [9, 1]
    assert after(5, 3, 7, 4, 3, 8, 6, 3) == [8, 6]  # of one token: the latest
    assert after(5, 3, 7, 4, 3, 8, 6, 3, count=4) == [7, 4, 3, 8]  # the latest is followed by three alone
    assert after(1, 2, 3) == []
    assert after(4) == []
    assert after(1, 1, 1, count=3) == [1]


def test_it_ends_where_the_text_ends_and_leaves_modes_as_they_were():
    model = make(torch.float64).train()
    plain = greedy(model.eval(), IDS[:1], 40)[0][0]
    model.generation_config.eos_token_id = plain[20]
    wanted = greedy(model, IDS[:1], 40)[0][0]
    out = speculative_generate(model.train(), "ngram", IDS[:1], 40)
    assert out.sequences[0].tolist() == wanted
    assert len(wanted) <= 21
    assert all(part.training for part in model.modules())
    for tokens, drafts in itertools.product((1, 2, 9), (1, 8)):
        assert speculative_generate(model, "ngram", IDS[:1], tokens, drafts).sequences.shape[1] <= 12 + tokens


def test_any_causal_model_can_be_the_target():
    model = smaller()
    out = speculative_generate(model, "ngram", PROMPTS[0], 20)
    assert out.union_shares == []
    assert out.sequences.tolist() == greedy(model, PROMPTS[0], 20)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_draft": 0}, "num_draft is 0; expected a whole number of at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
        ({"input_ids": IDS}, r"input_ids is \(2, 12\); expected \[1, T\]"),
        ({"input_ids": IDS[:1, :0]}, r"input_ids is \(1, 0\)"),
        ({"draft": make(vocab_size=47)}, "the draft model has 47 tokens and the target 48; expected one vocabulary"),
        ({"draft": "eagle"}, "draft is 'eagle'; expected 'ngram' or a causal language model"),
    ],
)
def test_what_cannot_be_written_is_refused(words, message):
    given = {"draft": "ngram", "input_ids": IDS[:1], "max_new_tokens": 4} | words
    with pytest.raises(ValueError, match=message):
        speculative_generate(make(), **given)
