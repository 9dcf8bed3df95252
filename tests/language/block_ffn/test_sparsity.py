"""What is measured: shares against loops over sets, their bounds, and the verb that prints them."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from block_ffn_models import make
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.language import model_sparsity, sparsity_stats
from fewer.language._shared.token_rows import documents_of
from fewer.language.block_ffn.study import draw_active
from fewer.tasks import load_small_lm


def by_sets(active, doc_ids, mask, windows):
    """The definitions, with sets of experts."""
    experts = active.shape[-1]
    unused, reused = [], []
    unions = {window: [] for window in windows}
    for row, documents, counted in zip(active.tolist(), doc_ids.tolist(), mask.tolist(), strict=True):
        pieces, last = [], None
        for token, document, valid in zip(row, documents, counted, strict=True):
            chosen = {expert for expert, on in enumerate(token) if on}
            if valid:
                unused.append(1 - len(chosen) / experts)
                if last != document:
                    pieces.append([])
                pieces[-1].append(chosen)
            last = document if valid else None
        for piece in pieces:
            reused += [len(a & b) / len(a) for a, b in itertools.pairwise(piece) if a]
            for window in windows:
                for start in range(0, len(piece) - window + 1, window):
                    unions[window].append(1 - len(set().union(*piece[start : start + window])) / experts)

    def mean(values):
        return sum(values) / len(values) if values else math.nan

    return mean(unused), {window: mean(found) for window, found in unions.items()}, mean(reused)


@given(seed=st.integers(0, 9999), share=st.floats(0.05, 0.95), length=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_shares_are_those_of_sets(seed, share, length):
    draw = torch.Generator().manual_seed(seed)
    active = torch.rand(2, length, 5, generator=draw) < share
    doc_ids = (torch.rand(2, length, generator=draw) < 0.2).long().cumsum(1)
    mask = (torch.rand(2, length, generator=draw) < 0.9).long()
    found = sparsity_stats(active, doc_ids, mask, windows=(2, 4))
    tls, cls, reuse = by_sets(active, doc_ids, mask, (2, 4))
    assert [found.tls, *found.cls.values(), found.reuse] == pytest.approx([tls, *cls.values(), reuse], nan_ok=True)
    assert found.tokens == int(mask.sum())


@given(seed=st.integers(0, 9999), share=st.floats(0.02, 0.98))
@settings(max_examples=40, deadline=None)
def test_a_union_is_at_most_the_sum_and_grows_with_its_window(seed, share):
    active = torch.rand(3, 32, 8, generator=torch.Generator().manual_seed(seed)) < share
    stats = sparsity_stats(active, windows=(1, 2, 4, 8, 16, 32))
    assert stats.cls[1] == pytest.approx(stats.tls)
    for window, cls in stats.cls.items():
        assert 1 - cls <= window * (1 - stats.tls) + 1e-12
    shares = list(stats.cls.values())
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(shares))


def test_documents_end_with_their_last_token():
    assert documents_of(torch.tensor([[3, 0, 0, 4]]), 0).tolist() == [[0, 0, 1, 2]]
    assert documents_of(torch.tensor([[3, 0, 0, 4]]), None).tolist() == [[0, 0, 0, 0]]


def test_a_model_is_measured_in_eval_mode_and_left_as_it_was():
    model = make().train()
    ids = torch.randint(2, 48, (3, 8))
    layers = model_sparsity(model, ids, batch=2)
    with torch.no_grad():
        logits = model.eval()(ids, output_router_logits=True).router_logits
    assert [each.tls for each in layers] == pytest.approx([1 - (each > 0).double().mean().item() for each in logits])
    assert all(part.training for part in model.train().modules())


@given(tokens=st.integers(1, 16), share=st.floats(0.02, 1), union=st.floats(0.02, 1))
@settings(max_examples=40, deadline=None)
def test_drawn_patterns_have_the_shares_that_are_asked_for(tokens, share, union):
    active = draw_active(tokens, 64, share, union, torch.Generator().manual_seed(0))
    each = max(1, round(share * 64))
    assert active.sum(1).tolist() == [each] * tokens
    assert int(active.any(0).sum()) == min(tokens * each, max(each, round(union * 64)), 64)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda a: sparsity_stats(a[0]), "expected booleans"),
        (lambda a: sparsity_stats(a.long()), "expected booleans"),
        (lambda a: sparsity_stats(a, windows=(0,)), "window is 0"),
        (lambda a: sparsity_stats(a, torch.zeros(1, 3).long()), r"doc_ids is \(1, 3\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run(torch.zeros(1, 4, 2, dtype=torch.bool))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "notes.txt").write_text("import os\n\ndef first(values):\n    return values[0]\n" * 400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWER_CACHE", str(folder / "cache"))
        lm = load_small_lm("family-micro", text=[folder / "notes.txt"])
    for name, model in (("block", make(vocab_size=2048, eos_token_id=0)), ("llama", lm.model)):
        model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    return folder


def test_the_verb_tells_each_layer(directory, capsys):
    from fewer.language.block_ffn.command import sparsity

    sparsity(directory / "block", [directory / "notes.txt"], window=8, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert len(told["layers"]) == 2
    assert told["mean"]["tls"] == pytest.approx(sum(layer["tls"] for layer in told["layers"]) / 2)
    sparsity(directory / "block", [directory / "notes.txt"], window=8)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1].split()[0] == "mean"


def test_the_verb_refuses_other_models(directory):
    from fewer.language.block_ffn.command import sparsity

    with pytest.raises(ValueError, match="holds a LlamaForCausalLM; expected a BlockFFN model"):
        sparsity(directory / "llama", [directory / "notes.txt"], window=8)
    with pytest.raises(ValueError, match="expected at least 100000, one window"):
        sparsity(directory / "block", [directory / "notes.txt"], window=100_000)


def test_generate_verifies_drafts_and_writes_what_it_writes_without(directory, capsys):
    """The area's verb with a draft: both kinds give the text of plain decoding; a draft of other tokens is refused."""
    from fewer.language.ffn_skip.command import generate

    told = []
    for draft in (None, "ngram", str(directory / "llama")):
        generate(directory / "block", "import os\n\ndef first(", tokens=12, draft=draft, as_json=True)
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["completion"] == told[1]["completion"] == told[2]["completion"]
    assert told[0]["tokens_a_pass"] is None
    assert told[1]["tokens_a_pass"] >= 1
    with pytest.raises(ValueError, match="--skip and --draft are given together"):
        generate(directory / "block", "import", skip=directory / "none.json", draft="ngram")
    with pytest.raises(ValueError, match="is no model directory"):
        generate(directory / "block", "import", draft="eagle")
