"""What ForwardGNN, its link predictor and its twin refuse, each with one clear error, and other graphs than that of the fit."""

from __future__ import annotations

import pytest
import torch
from communities import CLASSES, FEATURES, community_graph, fit, network
from torch_geometric.data import Data
from torch_geometric.nn import GraphConv
from torch_geometric.nn.models import GCN

from fewer.graphs import AddClassNodes, BackpropagationGNN, ForwardGNN, ForwardGNNConfig, fit_backpropagation
from fewer.graphs.forward_gnn.modes import MODES


def changed(**changes) -> Data:
    data = community_graph()
    for name, value in changes.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    return data


def with_nan() -> torch.Tensor:
    x = community_graph().x
    x[7, 2] = float("nan")
    return x


GOOD = community_graph()
BAD = {
    "no train_mask": (changed(train_mask=None), r"train_mask is missing; expected booleans \[90\].*RandomNodeSplit"),
    "an empty train_mask": (changed(train_mask=torch.zeros(90, dtype=torch.bool)), "train_mask marks no node"),
    "a class without training node": (
        changed(train_mask=GOOD.train_mask & (GOOD.y != 1)),
        "class 1 has no training node, so its virtual node would be isolated",
    ),
    "labels out of range": (changed(y=GOOD.y + 1), r"data.y holds 1..3 at training nodes; expected 0..2"),
    "labels out of range in validation": (changed(y=torch.where(GOOD.val_mask, 7, GOOD.y)), "at validation nodes; expected 0..2"),
    "labels that are no integers": (changed(y=GOOD.y.float()), r"data.y is \(90,\) torch.float32; expected integers"),
    "NaN features": (changed(x=with_nan()), "NaN or infinite value in row 7"),
    "integer features": (changed(x=GOOD.x.long()), "expected float features"),
    "an edge to nowhere": (changed(edge_index=torch.tensor([[0], [90]])), r"names nodes 0..90; expected 0..89"),
    "edges that are no pairs": (changed(edge_index=torch.zeros(3, 4, dtype=torch.long)), r"edge_index is \(3, 4\)"),
    "another feature width": (changed(x=GOOD.x[:, :5]), "has 5 features a node; the model was built for 12"),
    "class nodes already there": (AddClassNodes()(GOOD), "has class nodes already"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_graph_that_cannot_be_used_is_refused_and_nothing_is_trained(what):
    data, message = BAD[what]
    for mode in ("single", "ff_labels"):
        model = network(mode)
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(ValueError, match=message) as raised:
            fit(model, data)
        assert "\n" not in str(raised.value)
        assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "top_to_loss", "hidden": [16, 8]}, r"hidden_channels are \[16, 8\]; top_to_loss takes means over layers: expected equal"),
        ({"conv": "gat", "hidden": 18}, "hidden_channels is 18; GAT concatenates 4 heads: expected a multiple of 4"),
        ({"conv": "gin"}, "conv is 'gin'; expected"),
        ({"mode": "both"}, "mode is 'both'; expected one of"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a finite number above 0"),
        ({"append_label": "some"}, "append_label is 'some'"),
        ({"mode": "ff_labels", "append_label": "all"}, "gives labels in its own way"),
        ({"aug_edge_direction": "none"}, "aug_edge_direction is 'none'"),
        ({"layers": 0}, "num_layers is 0; expected a whole number of at least 1"),
        ({"hidden": [16]}, "hidden_channels has 1 widths for 2 layers"),
        ({"hidden": [16, 0]}, "hidden_channels is 0"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        network(**settings)


def test_settings_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="num_classes is 1; expected a whole number of at least 2"):
        ForwardGNN(4, 8, 2, 1)
    with pytest.raises(ValueError, match="first_counted_step is 11; expected at most test_time_steps=10"):
        ForwardGNNConfig(first_counted_step=11)
    for settings, message in [({"epochs": 0}, "epochs is 0"), ({"patience": 0}, "patience is 0"), ({"lr": -1.0}, "lr is -1.0")]:
        with pytest.raises(ValueError, match=message):
            fit(network(), GOOD, **settings)
    with pytest.raises(ValueError, match=r"mask is \(3,\) torch.bool; expected booleans \[90\]"):
        network().predict(GOOD, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("mode", MODES)
def test_another_graph_needs_training_nodes_of_its_own_or_the_class_nodes_of_the_fit(mode):
    model, other = network(mode), community_graph(nodes=60, seed=1)
    if mode not in ("ff_labels", "ff_virtual"):
        with pytest.raises(ValueError, match="keep_virtual=True on a model that was not fitted"):
            model.predict(other, keep_virtual=True)
    fit(model, GOOD, epochs=100)
    with pytest.raises(ValueError, match="has 5 features a node; the model was built for 12"):
        model.predict(changed(x=GOOD.x[:, :5]))
    bare = Data(x=other.x, edge_index=other.edge_index)
    with pytest.raises(ValueError, match="no train_mask.*set train_mask, or pass keep_virtual=True"):
        model.predict(bare)
    assert model.predict(other).shape == (60,)
    kept = model.predict(bare, keep_virtual=True)
    assert torch.equal(kept, model.predict(other, keep_virtual=True)), "labels of the other graph were read"
    assert model.predict(other, other.test_mask, keep_virtual=True).shape == (int(other.test_mask.sum()),)
    if mode == "single":
        assert (kept == other.y).float().mean() > 0.6


def test_a_convolution_of_ones_own_works_in_every_mode():
    for mode in MODES:
        model = network(mode, conv=lambda into, out: GraphConv(into, out))
        fit(model, GOOD, epochs=3)
        assert model.predict(GOOD).shape == (90,)
    widths = network("top_to_input", hidden=[16, 8], conv="sage")
    fit(widths, GOOD, epochs=3)
    assert [h.shape[1] for h in widths.embed(GOOD)] == [16, 8]


def test_the_twin_has_the_same_convolutions_and_pygs_own_models_can_be_trained():
    twin, ours = BackpropagationGNN(FEATURES, 16, 2, CLASSES), network()
    assert [type(layer.conv) for layer in twin.layers] == [type(layer.conv) for layer in ours.layers]
    assert [tuple(p.shape) for p in twin.layers.parameters()] == [tuple(p.shape) for p in ours.layers.parameters()]
    for model in (twin, GCN(FEATURES, 16, 2, CLASSES)):
        history = fit_backpropagation(model, GOOD, epochs=100, patience=20, lr=1e-2)
        found = model.eval()(GOOD.x, GOOD.edge_index).argmax(1)
        assert (found == GOOD.y)[GOOD.test_mask].float().mean() > 0.7
        assert (found == GOOD.y)[GOOD.val_mask].double().mean().item() == history.best_validation()
        assert history.epochs[-1].epoch in (history.best["network"] + 20, 100)
    with pytest.raises(ValueError, match="train_mask is missing"):
        fit_backpropagation(twin, changed(train_mask=None))
