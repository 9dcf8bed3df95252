"""Link prediction: scores, losses, negatives, locality, and AUC against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from communities import community_graph, leaves, losses_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F
from torch_geometric.transforms import RandomLinkSplit

from fewer.graphs import BackpropagationGNN, ForwardGNNConfig, ForwardLinkPredictor, fit_link_backpropagation
from fewer.graphs._shared.layers import normalize_rows
from fewer.graphs._shared.links import area_under_curve, link_logits, prepare_links


@pytest.fixture(scope="module")
def split():
    """Three communities that features tell apart and no edge joins."""
    data = community_graph()
    data.x = data.x + 2 * F.one_hot(data.y, 12)
    data.edge_index = data.edge_index[:, data.y[data.edge_index[0]] == data.y[data.edge_index[1]]]
    torch.manual_seed(0)
    return RandomLinkSplit(num_val=0.1, num_test=0.2, is_undirected=True, add_negative_train_samples=False)(data)


def predictor(seed=0, **settings) -> ForwardLinkPredictor:
    torch.manual_seed(seed)
    return ForwardLinkPredictor(12, 16, 2, **settings)


def fit(model, split, **settings):
    return model.fit(split[0], split[1], **{"epochs": 60, "lr": 1e-2, "generator": torch.Generator().manual_seed(0)} | settings)


@pytest.mark.parametrize("mode", ["single", "top_to_input"])
@pytest.mark.parametrize("loss", ["FL", "FF"])
def test_links_are_learnt_and_the_best_state_is_kept(split, mode, loss):
    model = predictor(mode=mode, loss=loss)
    history = fit(model, split)
    test, val = split[2], split[1]
    assert list(history.best) == (["layer 1", "layer 2"] if mode == "single" else ["network"])
    found = model.predict(test, test.edge_label_index)
    assert found.min() >= 0
    assert found.max() <= 1
    assert area_under_curve(found, test.edge_label) > 0.6
    again = area_under_curve(model.predict(val, val.edge_label_index), val.edge_label)
    assert again == pytest.approx(history.best_validation(), abs=1e-6)


def test_a_prediction_is_the_mean_over_layers_of_the_sigmoid_of_the_sum_of_products(split):
    data = split[2]
    for loss in ("FL", "FF"):
        model = predictor(loss=loss)
        h, found = data.x, 0
        for layer in model.layers:
            h = layer.conv(normalize_rows(h), data.edge_index).relu()
            product = h[data.edge_label_index[0]] * h[data.edge_label_index[1]]
            logit = product.sum(1) if loss == "FL" else product.square().sum(1) - 2
            found = found + logit.sigmoid() / 2
        torch.testing.assert_close(model.predict(data, data.edge_label_index), found.detach())
        torch.testing.assert_close(model.embed(data)[1], h.detach())


def test_a_layers_loss_is_bce_over_positive_and_as_many_drawn_pairs_and_reaches_that_layer_alone(split):
    model, problem = predictor(mode="top_to_input"), prepare_links(split[0], like=torch.zeros(1))
    negatives = problem.negatives(torch.Generator().manual_seed(1))
    h = model.layers[1]([torch.randn(90, 16)], problem.graph)
    loss = model.layer_loss(problem, negatives)(h)
    pairs = torch.cat([problem.positives, negatives], dim=1)
    truth = torch.arange(pairs.shape[1]) < problem.positives.shape[1]
    expected = F.binary_cross_entropy_with_logits((h[pairs[0]] * h[pairs[1]]).sum(1), truth.float())
    torch.testing.assert_close(loss, expected)
    assert leaves(loss) == {id(parameter) for parameter in model.layers[1].parameters()}
    assert [layer.widths for layer in model.layers] == [(12, 16), (16,)], "nothing stands above the last layer"


def test_training_layers_in_turn_leaves_the_first_one_untouched_by_the_second(split):
    models = [predictor(), predictor()]
    models[1].layers[1].conv.lin.weight.data.add_(1.0)
    for model in models:
        fit(model, split, epochs=5)
    assert torch.equal(models[0].layers[0].conv.lin.weight, models[1].layers[0].conv.lin.weight)


@pytest.mark.parametrize("conv", ["gcn", "sage"])
def test_kept_propagation_gives_the_losses_of_recomputed_ones(split, conv):
    one, other = (losses_of(fit(predictor(conv=conv), split, cache=cache, epochs=10, patience=None)) for cache in (True, False))
    assert one == pytest.approx(other, abs=1e-6)


def test_top_to_input_for_links_predicts_from_the_steps_that_count(split):
    config = ForwardGNNConfig(test_time_steps=3)
    model, data = predictor(mode="top_to_input", config=config), split[2]
    x = normalize_rows(data.x)
    one, two = model.layers[0].conv, model.layers[1].conv
    s1 = normalize_rows(one(torch.cat([x, torch.zeros(90, 16)], dim=1), data.edge_index).relu())
    s2 = normalize_rows(two(s1, data.edge_index).relu())
    for _ in range(3):
        h1, h2 = one(torch.cat([x, s2], dim=1), data.edge_index).relu(), two(s1, data.edge_index).relu()
        s1, s2 = normalize_rows(h1), normalize_rows(h2)
    expected = sum(link_logits(h, data.edge_label_index).sigmoid() / 2 for h in (h1, h2))
    torch.testing.assert_close(model.predict(data, data.edge_label_index), expected.detach())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_drawn_pairs_are_no_edges_and_no_loops(split, seed):
    problem = prepare_links(split[0], like=torch.zeros(1))
    drawn = problem.negatives(torch.Generator().manual_seed(seed))
    assert drawn.shape == problem.positives.shape
    edges = {tuple(pair) for pair in problem.graph.edge_index.T.tolist()}
    assert not [pair for pair in drawn.T.tolist() if tuple(pair) in edges or tuple(pair[::-1]) in edges or pair[0] == pair[1]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_the_area_under_the_curve_is_scikit_learns(pairs):
    scores, truth = torch.tensor([float(score) for score, _ in pairs]), torch.tensor([float(right) for _, right in pairs])
    if 0 < truth.sum() < len(truth):
        assert area_under_curve(scores, truth) == pytest.approx(roc_auc_score(truth, scores))
    else:
        assert area_under_curve(scores, truth) != area_under_curve(scores, truth)


def test_the_twin_learns_links(split):
    torch.manual_seed(0)
    twin = BackpropagationGNN(12, 16, 2, None)
    history = fit_link_backpropagation(twin, split[0], split[1], epochs=60, lr=1e-2, generator=torch.Generator().manual_seed(0))
    test = split[2]
    assert area_under_curve(link_logits(twin(test.x, test.edge_index), test.edge_label_index).detach(), test.edge_label) > 0.6
    assert history.best_validation() > 0.6


def test_what_cannot_be_used_is_refused(split):
    with pytest.raises(ValueError, match="the graph has no edge_label; expected pairs with labels: split it with"):
        fit(predictor(), (community_graph(), None))
    with pytest.raises(ValueError, match="has 12 features a node; the model was built for 5"):
        ForwardLinkPredictor(5, 8, 1).predict(split[2], split[2].edge_label_index)
    with pytest.raises(ValueError, match=r"names nodes 0..90; expected 0..89"):
        predictor().predict(split[2], torch.tensor([[0], [90]]))
    with pytest.raises(ValueError, match=r"edge_label_index is \(3,\)"):
        predictor().predict(split[2], torch.zeros(3, dtype=torch.long))
    wrong = split[0].clone()
    wrong.edge_label = torch.zeros(4)
    with pytest.raises(ValueError, match="data.edge_label is"):
        fit(predictor(), (wrong, None))
    with pytest.raises(ValueError, match="mode is 'top_to_loss'"):
        predictor(mode="top_to_loss")
    with pytest.raises(ValueError, match="loss is 'hinge'"):
        predictor(loss="hinge")
