"""The modes beside single forward, written out plainly: Forward-Forward's goodness and candidates, and both top-down signals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from communities import CLASSES, community_graph, fit, losses_of, network
from torch.nn import functional as F

from fewer.graphs import AddClassNodes, ForwardGNNConfig
from fewer.graphs._shared.layers import normalize_rows
from fewer.graphs.forward_gnn.losses import mean_goodness
from fewer.graphs.forward_gnn.modes import top_to_input


@pytest.mark.parametrize("mode", ["ff_labels", "ff_virtual"])
@pytest.mark.parametrize("conv", ["gcn", "gat"])
def test_a_forward_forward_prediction_is_the_brute_force_over_classes(mode, conv):
    data, model = community_graph(), network(mode, conv=conv)
    fit(model, data, epochs=5)
    nodes, scores = data.num_nodes, []
    for label in range(CLASSES):
        given = torch.where(data.train_mask, data.y, label)
        if mode == "ff_labels":
            h, edges = torch.cat([data.x, F.one_hot(given, CLASSES)], dim=1), data.edge_index
        else:
            h = torch.cat([data.x, model.class_features])
            to_class = torch.stack([torch.arange(nodes), nodes + given])
            edges = torch.cat([data.edge_index, to_class, to_class.flip(0)], dim=1)
        total = 0
        for layer in model.layers:
            h = layer.conv(h / (h.norm(dim=1, keepdim=True) + 1e-8), edges).relu()
            total = total + (h[:nodes] ** 2).mean(1) - 2
        scores.append(total)
    scores = torch.stack(scores, dim=1)
    torch.testing.assert_close(model.predict_proba(data), scores.softmax(1))
    assert torch.equal(model.predict(data), scores.argmax(1))
    assert mean_goodness(torch.ones(1, 4)).item() == -1.0


def test_forward_forward_losses_are_bce_of_the_sum_of_squares_over_theta_with_two_wrong_labellings():
    data, model = community_graph(), network("ff_labels", layers=1)
    train, y = data.train_mask, data.y[data.train_mask]
    (loss,) = model.local_losses(data, torch.Generator().manual_seed(3))
    draw = torch.Generator().manual_seed(3)
    goodness = []
    for labels in [y] + [(y + torch.randint(1, CLASSES, y.shape, generator=draw)) % CLASSES for _ in range(2)]:
        beside = torch.full((data.num_nodes, CLASSES), 1 / CLASSES)
        beside[train] = F.one_hot(labels, CLASSES).float()
        h = model.layers[0].conv(normalize_rows(torch.cat([data.x, beside], dim=1)), data.edge_index).relu()
        goodness.append((h[train] ** 2).sum(1) - 2.0)
    goodness = torch.cat(goodness)
    truth = torch.arange(len(goodness)) < len(y)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(goodness, truth.float()))


# Top-down signals


def test_top_to_loss_with_one_layer_is_single_forward_with_one_layer_without_the_norm():
    data = community_graph(dtype=torch.float64)
    data.x = normalize_rows(data.x)  # so that SF's norm changes nothing
    single, top = network(layers=1).double(), network("top_to_loss", layers=1).double()
    for model in (single, top):
        model.class_features.copy_(normalize_rows(model.class_features))
    histories = [losses_of(fit(model, data, patience=None)) for model in (single, top)]
    np.testing.assert_allclose(*histories, atol=1e-6)
    data.x = 3 * data.x
    assert top.local_losses(data)[0].item() != pytest.approx(single.local_losses(data)[0].item(), rel=1e-3)


def test_top_to_loss_sees_the_mean_of_its_output_and_the_states_above():
    data, model = community_graph(), network("top_to_loss", layers=3)
    graph = AddClassNodes(CLASSES, features=model.class_features)(data)
    outputs, states = [], [graph.x]
    for layer in model.layers:
        outputs.append(layer.conv(states[-1], graph.edge_index).relu())
        states.append(normalize_rows(outputs[-1]))
    for i, loss in enumerate(model.local_losses(data)):
        e = torch.stack([outputs[i], *states[i + 2 :]]).mean(0)
        expected = F.cross_entropy(e[:-CLASSES][data.train_mask] @ e[-CLASSES:].T, data.y[data.train_mask])
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("alternating", [False, True])
def test_alternating_updates_read_what_is_updated_already(alternating):
    """A recording layer: each output is the number of the call, so that what a layer reads says when it was made."""
    reads, calls = [], 0

    def run(i, below, above):
        nonlocal calls
        calls += 1
        reads.append((i + 1, None if below is None else below.item(), above.item()))
        return torch.tensor([[float(calls)]])

    identity = top_to_input.normalize_rows
    top_to_input.normalize_rows = lambda h: h
    try:
        states = [torch.tensor([[-float(i)]]) for i in (1, 2, 3)]
        new = top_to_input.time_step(run, states, torch.tensor([[9.0]]), alternating, lambda i, h: h)
    finally:
        top_to_input.normalize_rows = identity
    if alternating:  # layer 2 first, from the old states; then 1 and 3 read its new one
        assert reads == [(2, -1.0, -3.0), (1, None, 1.0), (3, 1.0, 9.0)]
    else:
        assert reads == [(1, None, -2.0), (2, -1.0, -3.0), (3, -2.0, 9.0)]
    assert [state.item() for state in states] == [-1.0, -2.0, -3.0]
    assert len(new) == 3


@pytest.mark.parametrize("alternating", [False, True])
def test_top_to_input_predicts_from_the_steps_that_count(alternating):
    """The time steps written out: from zeros above, labels above the last layer, steps 3 to 4 of 4."""
    config = ForwardGNNConfig(test_time_steps=4, alternating_update=alternating)
    data, model = community_graph(), network("top_to_input", layers=2, config=config)
    graph = AddClassNodes(CLASSES, features=model.class_features)(data)
    labels = torch.full((graph.num_nodes, CLASSES), 1 / CLASSES)
    known = graph.train_mask | graph.virtual_mask
    labels[known] = F.one_hot(graph.y[known], CLASSES).float()
    x, above = normalize_rows(graph.x), normalize_rows(labels)
    one, two = (lambda below, up, layer=layer: layer.conv(torch.cat([below, up], dim=1), graph.edge_index).relu() for layer in model.layers)
    s1 = normalize_rows(one(x, torch.zeros(graph.num_nodes, 16)))
    s2 = normalize_rows(two(s1, torch.zeros(graph.num_nodes, CLASSES)))
    total = torch.zeros(data.num_nodes, CLASSES)
    for step in (1, 2, 3, 4):
        if alternating:
            h2 = two(s1, above)
            h1 = one(x, normalize_rows(h2))
        else:
            h1, h2 = one(x, s2), two(s1, above)
        s1, s2 = normalize_rows(h1), normalize_rows(h2)
        if step >= 3:
            total += sum((h[:-CLASSES] @ h[-CLASSES:].T).softmax(1) for h in (h1, h2))
    torch.testing.assert_close(model.predict_proba(data), (total / 4).detach())
    torch.testing.assert_close(model.embed(data)[1], h2[:-CLASSES].detach())
