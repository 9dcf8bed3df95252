"""ForwardGNN against PyG's convolutions, NumPy and itself: formulas, locality, kept propagation, leakage, order, early stopping, memory."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from communities import CLASSES, FEATURES, community_graph, fit, leaves, losses_of, network, same
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, GCNConv, GraphConv, SAGEConv

from fewer.graphs import AddClassNodes, BackpropagationGNN, ForwardGNN, fit_backpropagation
from fewer.graphs._shared.layers import Graph, GraphLayer, normalize_rows
from fewer.graphs._shared.sparse import SparseMatrix, sparse_product
from fewer.graphs.forward_gnn.modes import MODES
from fewer.graphs.forward_gnn.problems import random_geometric_graph, shallower
from fewer.meters import tensor_memory

# Layers


@pytest.mark.parametrize("conv", ["gcn", "sage", "gat", lambda into, out: GraphConv(into, out)])
@pytest.mark.parametrize("zeros", [0.0, 0.95])
def test_a_layer_is_pygs_convolution_and_relu_however_it_is_computed(conv, zeros):
    data = AddClassNodes()(community_graph(zeros=zeros, dtype=torch.float64))
    layer = GraphLayer((5, 7), 8, conv).double()
    kinds = {"gcn": GCNConv, "sage": SAGEConv, "gat": GATConv}
    assert isinstance(layer.conv, kinds[conv] if isinstance(conv, str) else GraphConv)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    graph = Graph(data.edge_index, data.num_nodes, torch.float64)
    expected = layer.conv(data.x, data.edge_index).relu()
    torch.testing.assert_close(layer([data.x[:, :5], data.x[:, 5:]], graph), expected, rtol=0, atol=1e-9)
    whole = GraphLayer((12,), 8, conv).double()
    whole.load_state_dict(layer.state_dict())
    rows = torch.tensor([7, 3, 91])
    for x in [data.x] + [SparseMatrix.of_dense(data.x)] * isinstance(conv, str):
        for keep in (True, False):
            torch.testing.assert_close(whole.outputs_of(x, graph, rows, keep)(), expected[rows], rtol=0, atol=1e-9)


def test_a_sparse_product_has_the_dense_ones_gradient():
    dense = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(5, 6, dtype=torch.float64) * (torch.rand(5, 6) < 0.5)
    assert torch.autograd.gradcheck(lambda each: sparse_product(SparseMatrix.of_dense(matrix), each), dense)


def test_kept_propagation_gives_the_losses_of_recomputed_ones():
    for conv in ("gcn", "sage"):
        for data in (community_graph(), community_graph(zeros=0.95)):
            histories = []
            for cache in (True, False):
                model = network(layers=3, conv=conv)
                histories.append(losses_of(fit(model, data, cache=cache, patience=None)))
            assert len(histories[0]) == 60
            np.testing.assert_allclose(*histories, rtol=0, atol=1e-6)


def test_a_single_forward_step_is_the_one_derived_by_hand():
    """GCN in float64: the loss and its gradient written out with dense matrices in NumPy."""
    data = community_graph(nodes=20, dtype=torch.float64)
    model = network(layers=1, hidden=6, temperature=0.7).double()
    torch.nn.init.normal_(model.layers[0].conv.bias)
    (loss,) = model.local_losses(data)
    loss.backward()

    augmented = AddClassNodes(CLASSES, features=model.class_features)(data)
    count = augmented.num_nodes
    a = np.eye(count)
    for source, target in augmented.edge_index.T.tolist():
        a[target, source] += 1
    scale = 1 / np.sqrt(a.sum(1))
    a = scale[:, None] * a * scale
    x = augmented.x.numpy()
    x = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-8)
    z = a @ x @ model.layers[0].conv.lin.weight.detach().numpy().T + model.layers[0].conv.bias.detach().numpy()
    h = np.maximum(z, 0)
    train, y = data.train_mask.nonzero()[:, 0].numpy(), data.y[data.train_mask].numpy()
    logits = h[train] @ h[-CLASSES:].T / 0.7
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    expected = -np.log(p[np.arange(len(y)), y]).mean()
    g = (p - np.eye(CLASSES)[y]) / len(y) / 0.7
    dh = np.zeros_like(h)
    dh[train] += g @ h[-CLASSES:]
    dh[-CLASSES:] += g.T @ h[train]
    dz = dh * (z > 0)
    assert abs(loss.item() - expected) < 1e-9
    np.testing.assert_allclose(model.layers[0].conv.lin.weight.grad, dz.T @ (a @ x), rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.layers[0].conv.bias.grad, dz.sum(0), rtol=0, atol=1e-9)


# Locality


@pytest.mark.parametrize("mode", MODES)
def test_a_layers_loss_reaches_its_own_parameters_alone(mode):
    model = network(mode, layers=3)
    losses = model.local_losses(community_graph())
    assert len(losses) == 3
    for layer, loss in zip(model.layers, losses, strict=True):
        assert leaves(loss) == {id(parameter) for parameter in layer.parameters()}


def test_a_later_layer_changes_nothing_in_an_earlier_ones_training():
    models = [network(layers=2), network(layers=2)]
    models[1].layers[1].conv.lin.weight.data.add_(1.0)
    for model in models:
        fit(model, community_graph(), patience=None)
    assert same(models[0].layers[0].state_dict(), models[1].layers[0].state_dict())
    assert not same(models[0].layers[1].state_dict(), models[1].layers[1].state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_what_a_step_saves_for_its_gradient_does_not_grow_with_depth(mode):
    """Bytes alive at once of what autograd keeps: that of one layer, however many there are."""
    most = []
    for layers in (3, 6):
        alive = peak = 0

        def keep(tensor):
            nonlocal alive, peak
            box = Box(tensor)
            return box

        class Box:
            def __init__(self, tensor):
                nonlocal alive, peak
                self.tensor, self.size = tensor, tensor.numel()
                alive += self.size
                peak = max(peak, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
            fit(network(mode, layers=layers), community_graph(), epochs=2, patience=None)
        most.append(peak)
    assert most[1] == most[0]


# Labels


@pytest.mark.parametrize("mode", MODES)
def test_labels_of_nodes_that_do_not_train_change_nothing(mode):
    """Test labels never; validation labels only by choosing when to stop: without a validation mask they are not read either."""
    data = community_graph()
    replaced = data.clone()
    replaced.y = torch.where(data.train_mask | data.val_mask, data.y, torch.randint(CLASSES, data.y.shape))
    unwatched, unwatched_replaced = data.clone(), data.clone()
    unwatched_replaced.y = torch.where(data.train_mask, data.y, torch.randint(CLASSES, data.y.shape))
    del unwatched.val_mask, unwatched_replaced.val_mask
    for one, other in ((data, replaced), (unwatched, unwatched_replaced)):
        models, histories = [network(mode), network(mode)], []
        for model, each in zip(models, (one, other), strict=True):
            histories.append([line[:4] for line in fit(model, each, patience=6).epochs])
        assert str(histories[0]) == str(histories[1])  # nan is no number that equals itself
        assert same(models[0].state_dict(), models[1].state_dict())
        assert torch.equal(models[0].predict_proba(one), models[1].predict_proba(other))


@pytest.mark.parametrize("append_label", ["input", "all"])
@pytest.mark.parametrize("mode", ["single", "top_to_input", "top_to_loss"])
def test_appended_labels_are_read_and_do_not_leak(mode, append_label):
    data, plain = community_graph(), network(mode)
    replaced = data.clone()
    replaced.y = torch.where(data.train_mask | data.val_mask, data.y, torch.randint(CLASSES, data.y.shape))
    models = [network(mode, append_label=append_label) for _ in range(2)]
    for model, each in zip(models, (data, replaced), strict=True):
        fit(model, each)
    assert torch.equal(models[0].predict_proba(data), models[1].predict_proba(replaced))
    widths = [layer.widths[0] for layer in models[0].layers]
    assert widths[0] == plain.layers[0].widths[0] + CLASSES
    assert widths[1] == plain.layers[1].widths[0] + CLASSES * (append_label == "all")


# Predictions


@pytest.mark.parametrize("mode", MODES)
def test_predictions_do_not_depend_on_the_order_of_the_nodes(mode):
    data, model = community_graph(), network(mode)
    fit(model, data)
    order = torch.randperm(data.num_nodes)
    place = order.argsort()
    permuted = Data(x=data.x[order], y=data.y[order], train_mask=data.train_mask[order], edge_index=place[data.edge_index])
    torch.testing.assert_close(model.predict_proba(permuted), model.predict_proba(data)[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_communities_are_learnt(mode):
    data, model = community_graph(), network(mode)
    history = fit(model, data, epochs=150, lr=3e-2 if mode == "ff_virtual" else 1e-2)  # its goodness starts far below theta
    assert (model.predict(data, data.test_mask) == data.y[data.test_mask]).float().mean() > 0.7
    assert history.best_validation() > 0.7


@pytest.mark.parametrize("conv", ["gcn", "sage", "gat"])
@pytest.mark.parametrize("mode", MODES)
def test_isolated_nodes_get_finite_predictions(mode, conv):
    data, model = community_graph(), network(mode, conv=conv)
    assert not (data.edge_index == 0).any()
    data.x[0] = 0  # nothing to normalise either
    fit(model, data, epochs=3)
    probabilities = model.predict_proba(data)
    assert probabilities.isfinite().all()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(data.num_nodes))


def test_probabilities_are_the_mean_over_layers_of_the_softmax_of_inner_products():
    data, model = community_graph(), network(layers=3, temperature=0.5)
    h = AddClassNodes(CLASSES, features=model.class_features)(data)
    x, expected = h.x, 0
    for layer in model.layers:
        x = layer.conv(normalize_rows(x), h.edge_index).relu()
        expected = expected + (x[:-CLASSES] @ x[-CLASSES:].T / 0.5).softmax(1) / 3
    torch.testing.assert_close(model.predict_proba(data), expected)
    torch.testing.assert_close(model.embed(data)[2], x[:-CLASSES])


# Early stopping


@pytest.mark.parametrize("mode", MODES)
def test_the_best_validation_state_is_kept_and_found_again(mode):
    data, model = community_graph(zeros=0.5), network(mode)
    states = {}
    history = fit(
        model, data, epochs=60, patience=10, lr=3e-2, callbacks=[lambda line: states.update({line[:2]: copy.deepcopy(model.state_dict())})]
    )
    last = history.epochs[-1].stage
    seen = [line for line in history.epochs if line.stage == last and not math.isnan(line.validation)]
    assert history.best_validation() == max(line.validation for line in seen)
    assert all(line.epoch % 2 == 0 for line in seen)
    assert history.epochs[-1].epoch in (history.best[last] + 10, 60)
    found = (model.predict(data, data.val_mask) == data.y[data.val_mask]).double().mean().item()
    assert found == history.best_validation()
    kept = {name: value for name, value in model.state_dict().items() if "class_embeddings" not in name}
    at_best = states[last, history.best[last]]
    assert all(torch.equal(value, at_best[name]) for name, value in kept.items())


def test_without_validation_nodes_the_last_state_is_kept():
    data, model = community_graph(), network()
    del data.val_mask
    history = fit(model, data, epochs=7)
    assert history.best == {"layer 1": 7, "layer 2": 7}
    assert all(math.isnan(line.validation) for line in history.epochs)


def test_a_loss_that_is_not_finite_keeps_the_best_state():
    model = network()
    with pytest.raises(FloatingPointError, match=r"the loss of layer 1 is .* in epoch \d+.*try a lower lr"):
        fit(model, community_graph(), lr=1e38, epochs=50)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_first_layers_of_a_trained_network_are_what_a_shallower_fit_gives():
    for mode in ("single", "ff_labels", "ff_virtual"):
        deep, shallow = network(mode, layers=3), network(mode, layers=3)
        data = community_graph()
        fit(deep, data)
        torch.manual_seed(0)
        shallow = ForwardGNN(FEATURES, 16, 2, CLASSES, mode=mode)
        shallow.class_features.copy_(deep.class_features)
        fit(shallow, data)
        assert torch.equal(shallower(deep, 2).predict_proba(data), shallow.predict_proba(data))


# Memory


@pytest.mark.parametrize("conv", ["gcn", "sage", "gat"])
def test_memory_stays_flat_over_layers_where_backpropagations_grows(conv):
    data = random_geometric_graph(3000, 8)
    classes, peaks = int(data.y.max()) + 1, {}
    for layers in (2, 8):
        ours, twin = ForwardGNN(8, 64, layers, classes, conv), BackpropagationGNN(8, 64, layers, classes, conv)
        with tensor_memory(ours) as peak:
            ours.fit(data, epochs=2, patience=None)
        with tensor_memory(twin) as twin_peak:
            fit_backpropagation(twin, data, epochs=2, patience=None)
        peaks[layers] = peak.total, twin_peak.total
    assert peaks[8][0] <= 1.15 * peaks[2][0]
    # GCN and SAGE keep one matrix a layer for the gradient beside two to three that come and go; GAT keeps its messages too
    assert peaks[8][1] > {"gcn": 2.2, "sage": 1.9, "gat": 2.5}[conv] * peaks[2][1]


# Persistence


@pytest.mark.parametrize("mode", MODES)
def test_the_state_dict_brings_the_predictions_with_it(mode, tmp_path):
    data, model = community_graph(), network(mode)
    fit(model, data, epochs=4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = network(mode, seed=5)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other.predict_proba(data), model.predict_proba(data))
    assert torch.equal(other.predict(data, keep_virtual=True), model.predict(data, keep_virtual=True))
