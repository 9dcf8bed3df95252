"""The study on a user's own model and text, and what BlockFFN is held against."""

from __future__ import annotations

import pytest
import torch
from block_ffn_models import IDS, make
from own_model import figures_of, own_model

from fewer.language import BlockFFNForCausalLM
from fewer.language.block_ffn import study as room
from fewer.language.block_ffn.peers import DenseForCausalLM, ReMoEForCausalLM, TopKForCausalLM
from fewer.study import Scale

TEXT = "import os\n\ndef first(values):\n    return values[0]\n"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model directory and a text, as a user has them; the cache in a folder of its own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(room.STEPS, Scale.QUICK, 4)
        yield own_model(folder, patch, TEXT)


def figures(arm, settings):
    """What a trial logs; the same trial gives the same figures."""
    return figures_of(room, arm, settings)


def test_arms_run_on_a_users_model_and_text(own):
    mine = figures("chunk-loss", own)
    again = figures("chunk-loss", own)
    assert mine["loss",] == again["loss",] > 0
    assert mine["cls", ("window", 1)] == mine["tls",]
    assert mine["cls", ("window", 8)] <= mine["tls",]
    top_k = figures("top-k", own)
    chosen = (1 - top_k["tls",]) * 24
    assert chosen == pytest.approx(round(chosen), abs=1e-6)  # as many for every token
    task = room.study.build_task(Scale.QUICK, own)
    assert room.experts_a_token(task, 0) == round(chosen)  # as many as the model with both losses has on average
    assert task.config().hidden_size == 64


@torch.no_grad()
def test_a_top_k_router_activates_k_with_gates_that_add_up_to_one():
    model = TopKForCausalLM(make().config, 2)
    layer = model.feed_forwards()[0]
    logits = torch.randn(5, 6)
    assert layer.active(logits).sum(-1).tolist() == [2] * 5
    assert torch.allclose(layer.gates(logits).sum(-1), torch.ones(5))
    assert torch.equal(layer.gates(logits) > 0, layer.active(logits))
    even = [torch.eye(6).repeat(2, 1)[None] * 0] * 2
    assert model.auxiliary_loss(even, None, None) > 0


def test_each_peer_learns_and_remoes_factor_follows_its_sparsity():
    config = make().config
    for model in (TopKForCausalLM(config, 2), ReMoEForCausalLM(config, 0.9), ReMoEForCausalLM(config, 0.0), DenseForCausalLM(config)):
        assert isinstance(model, BlockFFNForCausalLM)
        model.train()(IDS, labels=IDS).loss.backward()
        assert model.feed_forwards()[0].up_proj.grad.any()
        if isinstance(model, ReMoEForCausalLM):
            assert (model.l1_factor > 1e-8) is (model.sparsity == 0.9)
