"""What users do with a network: dropout and eval mode, copies, other integers, short patience, half precision, graphs from files."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from communities import CLASSES, FEATURES, community_graph, fit, network, same
from torch_geometric.nn import GATConv
from torch_geometric.transforms import RandomLinkSplit

from fewer.errors import UserError
from fewer.graphs import BackpropagationGNN, ForwardGNN, ForwardLinkPredictor, fit_backpropagation, fit_link_backpropagation
from fewer.graphs.forward_gnn.problems import fold, read_graph
from fewer.graphs.forward_gnn.study import study
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, TrialSpec

MODES = ("single", "top_to_input", "top_to_loss", "ff_labels", "ff_virtual")


def dropping(into: int, out: int) -> GATConv:
    return GATConv(into, out, dropout=0.5)


def links():
    torch.manual_seed(0)
    split = RandomLinkSplit(num_val=0.1, num_test=0.2, is_undirected=True, add_negative_train_samples=False)
    return split(community_graph())


@pytest.mark.parametrize("mode", MODES)
def test_predictions_drop_nothing_and_give_the_mode_back(mode):
    data, model = community_graph(), network(mode, conv=dropping)
    history = fit(model, data, epochs=4)
    assert model.training
    model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    for look in (model.predict_proba, lambda each: torch.cat(model.embed(each))):
        assert torch.equal(look(data), look(data))
    assert [part.training for part in model.modules()] == modes
    found = (model.predict(data, data.val_mask) == data.y[data.val_mask]).double().mean().item()
    assert found == history.best_validation(), "validation dropped something"


@pytest.mark.parametrize("mode", ["single", "top_to_input"])
def test_link_predictions_drop_nothing_and_give_the_mode_back(mode):
    train_data, val_data, test_data = links()
    model = ForwardLinkPredictor(FEATURES, 16, 2, conv=dropping, mode=mode)
    model.fit(train_data, val_data, epochs=4, generator=torch.Generator().manual_seed(0))
    pairs = test_data.edge_label_index
    assert torch.equal(model.predict(test_data, pairs), model.predict(test_data, pairs))
    assert model.training
    assert torch.equal(model.embed(test_data)[1], model.embed(test_data)[1])


def test_the_twins_are_watched_without_dropout_and_given_their_mode_back():
    data = community_graph()
    train_data, val_data, _ = links()
    for model, run in (
        (BackpropagationGNN(FEATURES, 16, 2, CLASSES, dropping), lambda model: fit_backpropagation(model, data, epochs=4)),
        (
            BackpropagationGNN(FEATURES, 16, 2, None, dropping),
            lambda model: fit_link_backpropagation(model, train_data, val_data, epochs=4),
        ),
    ):
        for training in (True, False):
            history = run(model.train(training))
            assert all(part.training == training for part in model.modules())
    found = model_accuracy(BackpropagationGNN(FEATURES, 16, 2, CLASSES, dropping), data)
    assert found[0] == found[1]
    assert len(history.epochs) == 4


def model_accuracy(model, data):
    history = fit_backpropagation(model, data, epochs=4)
    scores = model.eval()(data.x, data.edge_index)
    return history.best_validation(), (scores.argmax(1) == data.y)[data.val_mask].double().mean().item()


@pytest.mark.parametrize("mode", MODES)
def test_a_network_can_be_copied_and_pickled_before_and_after_its_fit(mode):
    data, model = community_graph(), network(mode)
    for _ in range(2):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert same(*({name: value.nan_to_num() for name, value in each.state_dict().items()} for each in (twin, model)))
            assert torch.equal(twin.predict_proba(data), model.predict_proba(data))
        fit(model, data, epochs=2)


def test_predictors_and_twins_can_be_copied_and_pickled():
    data = community_graph()
    twin, predictor = BackpropagationGNN(FEATURES, 16, 2, CLASSES), ForwardLinkPredictor(FEATURES, 16, 2)
    fit_backpropagation(twin, data, epochs=2)
    for each in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert torch.equal(each(data.x, data.edge_index), twin(data.x, data.edge_index))
    pairs = data.edge_index[:, :3]
    assert torch.equal(copy.deepcopy(predictor).predict(data, pairs), predictor.predict(data, pairs))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("mode", MODES)
def test_labels_of_any_integers_are_labels(mode, dtype):
    data, narrow = community_graph(), community_graph()
    narrow.y = narrow.y.to(dtype)
    models = [network(mode), network(mode)]
    for model, each in zip(models, (data, narrow), strict=True):
        fit(model, each, epochs=2)
    assert torch.equal(models[0].predict_proba(data), models[1].predict_proba(narrow))
    twins = [BackpropagationGNN(FEATURES, 8, 1, CLASSES) for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    losses = [fit_backpropagation(twin, each, epochs=2).epochs[1].train_loss for twin, each in zip(twins, (data, narrow), strict=True)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("mode", MODES)
def test_with_a_patience_of_one_the_network_has_learnt_something(mode):
    data, model = community_graph(), network(mode)
    before = copy.deepcopy(model.state_dict())
    history = fit(model, data, patience=1)
    assert min(history.best.values()) >= 2
    for i in range(len(model.layers)):
        name = f"layers.{i}.conv.lin.weight"
        assert not torch.equal(model.state_dict()[name], before[name])


def test_validation_that_says_nothing_keeps_the_last_state():
    """Validation pairs of one kind have no AUC."""
    train_data, val_data, _ = links()
    val_data.edge_label = torch.ones_like(val_data.edge_label)
    model = ForwardLinkPredictor(FEATURES, 16, 1)
    before = model.layers[0].conv.lin.weight.detach().clone()
    history = model.fit(train_data, val_data, epochs=5, patience=2)
    assert history.best == {"layer 1": 5}
    assert not torch.equal(model.layers[0].conv.lin.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_in_one_line(dtype):
    data, pairs = community_graph(), torch.tensor([[0], [1]])
    for act in (
        lambda: fit(network().to(dtype), data),
        lambda: network("ff_labels").to(dtype).predict(data),
        lambda: ForwardLinkPredictor(FEATURES, 8, 1).to(dtype).predict(data, pairs),
        lambda: fit_backpropagation(BackpropagationGNN(FEATURES, 8, 1, CLASSES).to(dtype), data),
    ):
        with pytest.raises(ValueError, match=r"expected float32 or float64.*call .float\(\)"):
            act()


def test_widths_and_counts_may_be_numpys():
    model = ForwardGNN(np.int64(FEATURES), np.int64(8), np.int64(2), np.int64(CLASSES))
    assert model.widths == [8, 8]
    fit(model, community_graph(), epochs=np.int64(2))


# A graph from a file


@pytest.fixture
def file(tmp_path):
    data = community_graph()
    labels = data.y.numpy().copy()
    labels[0] = -1
    np.savez(tmp_path / "mine.npz", x=data.x.numpy(), edge_index=data.edge_index.numpy(), labels=labels)
    return tmp_path / "mine.npz"


def test_a_users_own_graph_is_read_dense_or_in_compressed_rows(file, tmp_path):
    graph = read_graph(file)
    assert graph.classes == CLASSES
    data = fold(graph, 0)
    assert not (data.train_mask | data.val_mask | data.test_mask)[0], "a node without a label"
    rows, columns = np.nonzero(graph.x)
    starts = np.searchsorted(rows, np.arange(len(graph.x) + 1))
    compressed = {"x_data": graph.x[rows, columns], "x_indices": columns, "x_indptr": starts, "x_shape": graph.x.shape}
    np.savez(tmp_path / "rows.npz", edge_index=graph.edge_index, labels=graph.y, **compressed)
    assert np.array_equal(read_graph(tmp_path / "rows.npz").x, graph.x)
    np.savez(tmp_path / "bad.npz", edge_index=graph.edge_index + 1, labels=graph.y, x=graph.x)
    with pytest.raises(ValueError, match=r"expected node numbers 0..89"):
        read_graph(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", edge_index=graph.edge_index, labels=graph.y)
    with pytest.raises(ValueError, match=r"has no x \(nor x_data\)"):
        read_graph(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", edge_index=graph.edge_index, labels=graph.y[:5], x=graph.x)
    with pytest.raises(ValueError, match=r"labels \(5,\)"):
        read_graph(tmp_path / "bad.npz")


def test_the_study_runs_on_a_users_own_graph(file, monkeypatch):
    monkeypatch.setattr("fewer.graphs.forward_gnn.study.GEOMETRIC", {"nodes": 200, "features": 4})
    options = study.choose_options({"graph": str(file)})
    graphs = study.build_task(Scale.QUICK, options)
    for arm in ("bp", "single", "ff-labels"):
        events = []
        settings = options | study.arms[arm].defaults(Scale.QUICK, options) | {"epochs": 4}
        study.arms[arm].run(graphs, Trial(TrialSpec(study.slug, study.slug, arm, 0, Scale.QUICK, settings), events.append))
        figures = {(event.name, *event.coordinates.items()) for event in events if isinstance(event, FigureEvent)}
        assert ("accuracy", ("data", "graph"), ("layers", 4)) in figures
        assert {("seconds",), ("cpu_seconds",), ("epochs",)} <= figures
        assert (("bytes", ("layers", 8)) in figures) == (arm != "ff-labels")


def test_a_graph_that_cannot_be_used_is_the_users_mistake(tmp_path):
    (tmp_path / "mine.npz").write_text("none")
    for name, words in (("mine.npz", "cannot be read as an .npz file"), ("nowhere.npz", "no file")):
        with pytest.raises(UserError, match=words):
            study.build_task(Scale.QUICK, study.choose_options({"graph": str(tmp_path / name)}))
