"""Split equals whole, SplitFed is a case, the order of phases, what is chosen, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from split_vits import CLASSES, RecordingWire, cut, federation, images
from torch.nn import functional as F

from fewer.federated import (
    FedAvg,
    FlatModel,
    Independent,
    LocalConfig,
    SFPrompt,
    SFPromptConfig,
    Shards,
    Wire,
    el2n,
    keep_hardest,
    simulate,
)
from fewer.federated._shared.clients import Shard, client_rng
from fewer.federated.sfprompt.algorithm import SplitClient

BOTH = pytest.mark.parametrize("at", ["input", "cut"])
CUTS = pytest.mark.parametrize(
    "words", [{"at": "input"}, {"at": "cut"}, {"at": "cut", "tail_blocks": 0}], ids=["input", "cut", "class token"]
)
ALL = Independent(1.0)


def client_at(split, x, y, config=None):
    """A client that holds all the examples, and the wire to the body."""
    flat = FlatModel(split.client())
    config = config or SFPromptConfig(lr=0.1)
    return SplitClient(Shard(0, flat, x, y, torch.arange(len(x))), flat.initial(), config, 1), Wire(split.server())


def step(client, wire, rows):
    smashed, prompt = client.smash(rows)
    gradient = client.step_tail(rows, wire.forward(0, smashed, prompt))
    client.step_prompt(rows, wire.backward(0, gradient))


@CUTS
def test_a_split_step_is_a_step_of_the_whole(words):
    split, (x, y) = cut(torch.float64, **words), images(12, torch.float64)
    whole = FlatModel(split)
    client, wire = client_at(split, x, y)
    expected = whole.initial()
    for step_ in range(10):
        rows = np.arange(12)[step_ % 3 :: 2]
        gradient = whole.gradient(expected, x[rows], y[rows])
        before = client.y.clone()
        step(client, wire, rows)
        assert ((before - client.y) / 0.1 - gradient).abs().max() <= 1e-12
        expected = expected - 0.1 * gradient
        assert gradient[: client.prompt_size].norm() > 1e-4
    assert (client.y - expected).abs().max() <= 1e-12


@BOTH
def test_the_prompt_is_started_anew_where_the_graph_is_gone(at):
    """As over Flower, where the head runs again when the gradient comes."""
    split, (x, y) = cut(torch.float64, at=at), images(12, torch.float64)
    kept, lost = (client_at(split, x, y) for _ in range(2))
    rows = np.arange(12)
    step(*kept, rows)
    client, wire = lost
    smashed, prompt = client.smash(rows)
    gradient = client.step_tail(rows, wire.forward(0, smashed, prompt))
    client._graph = None
    client.step_prompt(rows, wire.backward(0, gradient))
    assert (client.y - kept[0].y).abs().max() <= 1e-12


@CUTS
def test_head_and_body_do_not_change(words):
    split = cut(**words)
    before = copy.deepcopy(split.state_dict())
    history = simulate(SFPrompt(SFPromptConfig(batch_size=5), Wire(split.server())), split.client, federation(), 2, sampler=ALL)
    assert all(torch.equal(before[name], value) for name, value in split.state_dict().items())
    assert set(history.state_dict()) == set(split.trained_names)
    assert (history.server.x - history.flat.initial()).norm() > 1e-2


@CUTS
def test_split_federated_learning_is_a_case(words):
    """keep 1 and no phase 1 is FedAvg on the frozen model with the same batches."""
    split, shards = cut(**words), federation()
    config = SFPromptConfig(keep=1.0, shortcut_epochs=0, batch_size=8, lr=0.2, weight_decay=1e-3, lr_decay=0.9)
    ours = simulate(SFPrompt(config, Wire(split.server())), split.client, shards, 3, sampler=ALL, seed=2)
    fedavg = FedAvg(
        LocalConfig(local_epochs=1, batch_size=8, lr=0.2, weighted=True, max_grad_norm=math.inf, weight_decay=1e-3, lr_decay=0.9)
    )
    theirs = simulate(fedavg, lambda: split, shards, 3, sampler=ALL, seed=2)
    assert (ours.server.x - theirs.server.x).abs().max() <= 1e-6
    assert (ours.server.x - ours.flat.initial()).norm() > 0.1


def test_without_a_wire_the_body_is_the_models_own():
    split, shards = cut(), federation()
    config = SFPromptConfig(batch_size=8)
    with_wire = simulate(SFPrompt(config, Wire(split.server())), split.client, shards, 2, sampler=ALL)
    without = simulate(SFPrompt(config), lambda: split, shards, 2, sampler=ALL)
    assert torch.equal(with_wire.server.x, without.server.x)


def test_without_a_prompt_the_tail_alone_is_trained_and_no_gradient_travels():
    split, shards = cut(prompt_tokens=0), federation()
    wire = Wire(split.server())
    config = SFPromptConfig(keep=1.0, shortcut_epochs=0, batch_size=8)
    ours = simulate(SFPrompt(config, wire), split.client, shards, 2, sampler=ALL)
    local = LocalConfig(local_epochs=1, batch_size=8, lr=0.2, weighted=True, max_grad_norm=math.inf, weight_decay=0, lr_decay=1)
    theirs = simulate(FedAvg(local), lambda: split, shards, 2, sampler=ALL)
    assert (ours.server.x - theirs.server.x).abs().max() <= 1e-6
    assert set(wire.numbers) == {"model_down", "smashed", "output", "model_up"}
    assert not wire.server.waiting


def test_p_and_the_tail_are_clipped_apart():
    split, (x, y) = cut(torch.float64), images(12, torch.float64)
    config = SFPromptConfig(lr=1.0, max_grad_norm=1e-3)
    client, wire = client_at(split, x, y, config)
    before, rows = client.y.clone(), np.arange(12)
    step(client, wire, rows)
    moved = client.y - before
    assert moved[: client.prompt_size].norm() == pytest.approx(1e-3, rel=1e-2)
    assert moved[client.prompt_size :].norm() == pytest.approx(1e-3, rel=1e-2)
    client.step_shortcut(rows)
    moved = client.y - before - moved
    assert moved[: client.prompt_size].norm() == pytest.approx(1e-3, rel=1e-2)


@BOTH
def test_half_precision_is_near_single(at):
    shards = federation()
    exact = simulate(SFPrompt(SFPromptConfig(batch_size=8, keep=1.0)), lambda: cut(at=at), shards, 1, sampler=ALL)
    for dtype in (torch.bfloat16, torch.float16):
        half = simulate(SFPrompt(SFPromptConfig(batch_size=8, keep=1.0)), lambda dtype=dtype: cut(at=at).to(dtype), shards, 1, sampler=ALL)
        moved = (exact.server.x - exact.flat.initial()).norm()
        assert (half.server.x - exact.server.x).norm() <= 40 * torch.finfo(dtype).eps * moved


def test_threads_give_the_same():
    from concurrent.futures import ThreadPoolExecutor

    split, shards = cut(), federation()
    histories, wires = [], []
    with ThreadPoolExecutor(3) as pool:
        for executor in (None, pool):
            wires.append(Wire(split.server()))
            algorithm = SFPrompt(SFPromptConfig(batch_size=8), wires[-1])
            histories.append(simulate(algorithm, split.client, shards, 2, sampler=ALL, executor=executor))
    assert torch.equal(histories[0].server.x, histories[1].server.x)
    assert wires[0].bytes == wires[1].bytes


# EL2N


@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_el2n_is_the_brute_force(n, classes, seed):
    draw = np.random.default_rng(seed)
    logits, labels = draw.normal(size=(n, classes)) * 3, draw.integers(classes, size=n)
    expected = []
    for z, y in zip(logits, labels, strict=True):
        p = [math.exp(each) / sum(math.exp(other) for other in z) for each in z]
        expected.append(math.sqrt(sum((p[c] - (c == y)) ** 2 for c in range(classes))))
    got = el2n(torch.tensor(logits), torch.tensor(labels))
    assert np.abs(got.numpy() - expected).max() <= 1e-7
    assert torch.allclose(el2n(torch.tensor(logits) + 7.0, torch.tensor(labels)), got, atol=1e-12)


def test_el2n_of_what_is_certain():
    certain = torch.tensor([[200.0, 0, 0], [200.0, 0, 0]])
    assert el2n(certain, torch.tensor([0, 1])).tolist() == [0.0, pytest.approx(math.sqrt(2))]
    assert el2n(certain.half(), torch.tensor([0, 1])).dtype == torch.float32


def test_el2n_takes_a_label_an_example():
    for labels in (torch.tensor([1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"the labels are of shape \(\d,\); expected \(3,\), one an example"):
            el2n(torch.zeros(3, 2), labels)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.floats(0.01, 1.0), st.randoms())
@settings(max_examples=60, deadline=None)
def test_keep_hardest_is_the_sorted_brute_force(scores, keep, random):
    count = max(1, round(keep * len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])
    assert keep_hardest(torch.tensor(scores, dtype=torch.float32), keep).tolist() == expected
    distinct = [score + j / 100 for j, score in enumerate(scores)]
    order = list(range(len(scores)))
    random.shuffle(order)
    kept = set(keep_hardest(torch.tensor(distinct), keep).tolist())
    permuted = keep_hardest(torch.tensor([distinct[j] for j in order]), keep).tolist()
    assert {order[j] for j in permuted} == kept


@pytest.mark.parametrize("keep", [0.0, 1.5, -0.1, math.nan])
def test_a_share_out_of_range_is_refused(keep):
    for refuses in (lambda: keep_hardest(torch.zeros(3), keep), lambda: SFPromptConfig(keep=keep)):
        with pytest.raises(ValueError, match="keep is"):
            refuses()


# The order of the phases


@pytest.mark.parametrize("score", ["after", "before"])
def test_it_is_scored_after_or_before_phase_1(score):
    split, (x, y) = cut(), images(40)
    config = SFPromptConfig(score=score, shortcut_epochs=4, lr=0.5, batch_size=8, keep=0.25)
    client, _ = client_at(split, x, y, config)
    batches = client.begin(client_rng(0, 1, 0))
    flat, by_hand = client.flat, {}
    trained = client.y.clone()
    for name, vector in (("before", flat.initial()), ("after", trained)):
        e = (flat.module_at(vector)(x).softmax(1) - F.one_hot(y, CLASSES)).norm(dim=1)
        by_hand[name] = set(e.argsort(descending=True)[:10].tolist())
    assert by_hand["before"] != by_hand["after"]
    assert set(np.concatenate(batches).tolist()) == by_hand[score]
    assert [len(rows) for rows in batches] == [8, 2]


def test_what_is_selected():
    split, (x, y) = cut(), images(40)
    kept = {}
    for select in ("el2n", "easiest", "random"):
        client, _ = client_at(split, x, y, SFPromptConfig(select=select, shortcut_epochs=0, keep=0.25))
        kept[select] = set(np.concatenate(client.begin(client_rng(0, 1, 0))).tolist())
        scores = client.scores()
    ranked = scores.argsort(descending=True).tolist()
    assert kept["el2n"] == set(ranked[:10])
    assert kept["easiest"] == set(ranked[-10:])
    assert len(kept["random"]) == 10
    assert kept["random"] not in (kept["el2n"], kept["easiest"])


def test_the_reply_tells_how_many_are_sent_and_weighs_by_all():
    split, shards = cut(), federation()
    history = simulate(SFPrompt(SFPromptConfig(keep=0.5)), lambda: split, shards, 1, sampler=ALL)
    assert history.rounds[0].metrics["sent"] == np.mean([round(0.5 * len(part)) for part in shards.parts])


# What travels


def messages(split, y, seed=0):
    x, _ = images(20)
    wire = RecordingWire(split.server())
    config = SFPromptConfig(shortcut_epochs=0, keep=1.0, batch_size=8)
    simulate(SFPrompt(config, wire), split.client, Shards(x, y, [range(20)]), 1, sampler=ALL, seed=seed)
    return wire.seen


@CUTS
def test_only_activations_and_gradients_of_the_declared_shapes_travel(words):
    split, y = cut(**words), images(20)[1]
    seen = messages(split, y)
    kinds = [kind for kind, _ in seen]
    prompt = ["prompt"] if words["at"] == "cut" else []
    assert kinds == ["model_down", *(["smashed", *prompt, "output", "output_gradient", "returned_gradient"] * 3), "model_up"]
    out = 1 if split.class_token_only else 7
    size = FlatModel(split).size
    for rows, place in zip((8, 8, 4), range(3), strict=True):
        told = dict(seen[1 + place * (4 + len(prompt)) : 1 + (place + 1) * (4 + len(prompt))])
        assert all(tensor.is_floating_point() for tensor in told.values())
        assert {kind: tuple(tensor.shape) for kind, tensor in told.items()} == {
            "smashed": (rows, *split.cut_shape), "output": (rows, out, 16), "output_gradient": (rows, out, 16),
            "returned_gradient": (2, 16) if prompt else (rows, 7, 16), **({"prompt": (2, 16)} if prompt else {}),
        }  # fmt: skip
    assert seen[0][1].shape == seen[-1][1].shape == (size,)


@BOTH
def test_labels_show_in_the_gradients_alone(at):
    split, y = cut(at=at), images(20)[1]
    mine, permuted = messages(split, y), messages(split, y.roll(1))
    batches = [
        [dict(seen[1 + p * (len(seen) - 2) // 3 : 1 + (p + 1) * (len(seen) - 2) // 3]) for p in range(3)] for seen in (mine, permuted)
    ]
    first, second = batches[0][0], batches[1][0]
    assert torch.equal(first["smashed"], second["smashed"])
    assert torch.equal(first["output"], second["output"])
    assert not torch.equal(first["output_gradient"], second["output_gradient"])
    if at == "cut":  # the head does not depend on what is learnt: true of every batch
        assert all(torch.equal(a["smashed"], b["smashed"]) for a, b in zip(*batches, strict=True))


# What is refused


def test_labels_that_are_no_classes_are_refused():
    split, (x, y) = cut(), images(20)
    for labels, message in (
        (y + 1, r"the labels go from 1 to 3; expected 0 to 2"),
        (y - 1, "the labels go from -1"),
        (y.float(), "the labels are torch.float32"),
    ):
        for shortcut in (0, 1):
            with pytest.raises(ValueError, match=message):
                simulate(SFPrompt(SFPromptConfig(shortcut_epochs=shortcut)), lambda: split, Shards(x, labels, [range(20)]), 1, sampler=ALL)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_whole_numbers_of_any_type_are_labels(dtype):
    split, (x, y) = cut(), images(20)
    ends = [
        simulate(SFPrompt(), lambda: split, Shards(x, y.to(each), [range(20)]), 1, sampler=ALL).server.x for each in (dtype, torch.int64)
    ]
    assert torch.equal(*ends)


def test_a_client_with_nan_is_left_out():
    split, shards = cut(), federation()
    shards.x[shards.parts[1][0]] = math.nan
    with pytest.warns(UserWarning, match="client 1 sent 'model' with NaN or infinite numbers; its reply is left out of this round"):
        history = simulate(SFPrompt(SFPromptConfig(keep=1.0)), lambda: split, shards, 1, sampler=ALL)
    others = Shards(shards.x, shards.y, [shards.parts[0], shards.parts[2]])
    assert history.server.x.isfinite().all()
    assert len(others) == 2


def test_a_client_without_a_way_to_the_body_is_refused():
    with pytest.raises(
        ValueError, match=r"no wire leads to a body; expected SFPrompt\(config, Wire\(split.server\(\)\)\), or a SplitModel"
    ):
        simulate(SFPrompt(), cut().client, federation(), 1, sampler=ALL)
    with pytest.raises(ValueError, match="executor='vmap'"):
        simulate(SFPrompt(), cut, federation(), 1, sampler=ALL, executor="vmap")
    with pytest.raises(ValueError, match="the model is a Linear; expected a SplitModel"):
        simulate(SFPrompt(wire=Wire(cut().server())), lambda: torch.nn.Linear(2, 2), federation(), 1, sampler=ALL)


def test_more_examples_than_the_break_even_are_warned_of():
    split, (x, y) = cut(), images(200)
    with pytest.warns(
        UserWarning, match=r"client 0 sends 200 examples a round and full fine-tuning costs as much as \d+; expected at most"
    ):
        simulate(SFPrompt(SFPromptConfig(keep=1.0)), lambda: split, Shards(x, y, [range(200)]), 1, sampler=ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate(SFPrompt(SFPromptConfig(keep=0.05)), lambda: split, Shards(x, y, [range(200)]), 1, sampler=ALL)


def test_settings_survive_copies_and_refuse_what_is_out_of_range():
    config = SFPromptConfig(keep=0.2, select="random")
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    algorithm = SFPrompt(config, Wire(cut().server()))
    assert copy.deepcopy(algorithm) == pickle.loads(pickle.dumps(algorithm)) == algorithm
    assert repr(algorithm) == repr(SFPrompt(config))
    words: dict[str, Any]
    for words in ({"shortcut_epochs": -1}, {"split_epochs": 0}, {"select": "hardest"}, {"score": "then"}, {"lr": 0.0}):
        with pytest.raises(ValueError, match=next(iter(words))):
            SFPromptConfig(**words)
