"""The cut model: equal to the whole, what is trained, what is refused, and the shortcut's trap."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from split_vits import CLASSES, cut, images, vit
from torch import nn

from fewer.federated import SplitModel, insert_prompt, split_vit
from fewer.federated.sfprompt.split_model import Blocks, ViTHead, ViTTail, class_token_after

BOTH = pytest.mark.parametrize("at", ["input", "cut"])


@pytest.mark.parametrize("blocks", [(1, 1), (0, 1), (2, 0)])
def test_without_a_prompt_it_is_the_transformer(blocks):
    whole = vit().eval()
    x, _ = images(5)
    split = split_vit(whole, *blocks, prompt_tokens=0).eval()
    assert torch.allclose(split(x), whole(x).logits, atol=1e-6)
    assert split.prompt is None
    assert split.tokens == 5


def test_the_last_block_computes_the_class_token_alone():
    split, (x, _) = cut(tail_blocks=2), images(5)
    tokens, last = split.smashed(x), split.tail.layers[-1]
    assert torch.allclose(class_token_after(last, tokens), last(tokens)[:, :1], atol=1e-5)
    assert torch.equal(class_token_after(nn.Identity(), tokens), tokens[:, :1])  # a block that is built otherwise
    expected = split.tail.classifier(split.tail.norm(last(split.tail.layers[0](tokens)))[:, 0])
    assert torch.allclose(split.tail(tokens), expected, atol=1e-5)


@BOTH
def test_merged_is_the_transformer_with_its_prompt(at):
    split = cut(at=at).eval()
    x, _ = images(5)
    merged = split.merged()
    assert not merged.training
    assert torch.allclose(merged(x).logits, split(x), atol=1e-6)
    with torch.no_grad():
        split.prompt.mul_(-3)
    assert not torch.allclose(merged(x).logits, split(x), atol=1e-3)  # a copy


@BOTH
def test_what_is_merged_is_saved_and_read_back(at, tmp_path):
    split = cut(at=at).eval()
    merged = split.merged()
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    other = cut(at=at, seed=5).merged()
    other.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    x, _ = images(5)
    assert torch.equal(other(x).logits, merged(x).logits)
    prompts = [name for name, _ in other.named_parameters() if name not in dict(vit().named_parameters())]
    assert prompts == ["vit.embeddings.prompt" if at == "input" else "vit.layers.1.prompt"]
    for copied in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert torch.equal(copied(x).logits, merged(x).logits)


@BOTH
def test_prompt_and_tail_are_trained_alone(at):
    split = cut(at=at)
    assert split.trained_names[0] == "prompt"
    assert {name.split(".")[0] for name in split.trained_names} == {"prompt", "tail"}
    assert split.client().trained_names == split.trained_names
    assert not any(name.startswith("body") for name, _ in split.client().named_parameters())


def test_the_whole_is_left_as_it_was():
    whole = vit()
    before = copy.deepcopy(whole.state_dict())
    split = split_vit(whole)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in whole.state_dict().items())
    assert all(parameter.requires_grad for parameter in whole.parameters())


@BOTH
def test_it_survives_copies_and_keeps_what_is_frozen_in_evaluation_mode(at):
    split = cut(at=at)
    x, _ = images(3)
    for other in (copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        assert torch.equal(other(x), split(x))
    other = cut(at=at, seed=5)
    other.load_state_dict(split.state_dict())
    assert torch.equal(other(x), split(x))
    split.train()
    assert (split.head.training, split.body.training, split.tail.training) == (False, False, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@BOTH
def test_any_precision(at, dtype):
    split, (x, _) = cut(at=at).eval(), images(3)
    expected, got = split(x), copy.deepcopy(split).to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() <= 30 * max(torch.finfo(dtype).eps, 1e-7) * expected.abs().max()


def test_the_prompt_comes_after_the_class_token():
    tokens = torch.arange(6.0).view(1, 3, 2)
    prompt = torch.tensor([[9.0, 9.0]])
    assert torch.equal(insert_prompt(tokens, prompt)[0], torch.tensor([[0.0, 1.0], [9.0, 9.0], [2.0, 3.0], [4.0, 5.0]]))


def test_one_image_and_one_that_is_not_contiguous():
    split, (x, _) = cut().eval(), images(4)
    assert torch.allclose(split(x[:1]), split(x)[:1], atol=1e-6)
    assert torch.equal(split(x.transpose(2, 3).contiguous().transpose(2, 3)), split(x))


# The trap


def test_without_a_block_in_head_and_tail_it_is_refused():
    with pytest.raises(ValueError, match="head_blocks and tail_blocks are 0: the class token is the same for every image"):
        split_vit(vit(), 0, 0)


@BOTH
def test_because_the_shortcut_would_never_see_the_image(at):
    model = vit()
    head = ViTHead(model.vit.embeddings, []).requires_grad_(False)
    body = Blocks(model.vit.layers).requires_grad_(False)
    split = SplitModel(head, body, ViTTail([], model.vit.layernorm, model.classifier), 2, at, 16).eval()
    x, _ = images(2)
    assert (split(x)[0] - split(x)[1]).abs().max() > 1e-3
    assert torch.equal(split.shortcut(x)[0], split.shortcut(x)[1])


# What is refused


@pytest.mark.parametrize("blocks", [(2, 2), (4, 0), (3, 2)])
def test_a_cut_without_a_body_is_refused(blocks):
    with pytest.raises(ValueError, match="of 4 blocks; expected fewer together, so that a body is left"):
        split_vit(vit(), *blocks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompt_tokens": -1}, "prompt_tokens is -1; expected a whole number of at least 0"),
        ({"at": "inputs"}, "at is 'inputs'; expected one of input, cut: did you mean 'input'?"),
        ({"head_blocks": -1}, "head_blocks is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split_vit(vit(), **words)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="the model is a Linear; expected transformers' ViTForImageClassification"):
        split_vit(nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def parts():
    return nn.Linear(3, 8).requires_grad_(False), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, CLASSES)


def test_a_body_that_is_trained_or_keeps_statistics_is_refused():
    head, body, tail = parts()
    with pytest.raises(ValueError, match=r"the body trains '1.weight'; expected a frozen body: body.requires_grad_\(False\)"):
        SplitModel(head, nn.Sequential(body, nn.Linear(8, 8)), tail, width=8)
    with pytest.raises(ValueError, match=r"the head trains 'weight'"):
        SplitModel(nn.Linear(3, 8), body, tail, width=8)
    norm = nn.Sequential(body, nn.BatchNorm1d(8)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm1d\) of the body is in training mode"):
        SplitModel(head, norm, tail, width=8)
    assert not SplitModel(head, norm.eval(), tail, width=8).train().body.training


def test_dropout_in_head_or_tail_is_refused():
    head, body, tail = parts()
    with pytest.raises(ValueError, match=r"layer '1' of the tail drops out with probability 0.1"):
        SplitModel(head, body, nn.Sequential(tail, nn.Dropout(0.1)), width=8)
    with pytest.raises(ValueError, match=r"of the head drops out with probability 0.3"):
        split_vit(vit(attention_probs_dropout_prob=0.3))
    with pytest.raises(ValueError, match=r"layer '1' of the tail drops out with probability 0.2"):
        SplitModel(head, body, nn.Sequential(tail, nn.LSTM(3, 3, num_layers=2, dropout=0.2)), width=8)
    SplitModel(head, nn.Sequential(body, nn.Dropout(0.1)), tail, width=8)  # the body is never in training mode


def test_a_tail_that_is_frozen_and_a_width_that_is_not_told_are_refused():
    head, body, tail = parts()
    with pytest.raises(ValueError, match="the tail has no parameter that is trained"):
        SplitModel(head, body, copy.deepcopy(tail).requires_grad_(False), width=8)
    with pytest.raises(ValueError, match=r"no LayerNorm that tells its width; expected SplitModel\(..., width=D\)"):
        SplitModel(head, body, tail)
    with pytest.raises(ValueError, match="class_token_only with at='input'"):
        SplitModel(head, body, tail, width=8, class_token_only=True)
