"""Class nodes: the augmentation written out by hand, its way back, its company among PyG's transforms, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric import transforms as T
from torch_geometric.data import Data

from fewer.graphs import AddClassNodes, remove_class_nodes
from fewer.graphs.forward_gnn.class_nodes import label_features


def six_nodes(**more) -> Data:
    """Nodes 0, 1, 3 train (classes 0, 1, 0), node 2 validates, 4 and 5 test."""
    edges = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
    train = torch.tensor([True, True, False, True, False, False])
    validation = torch.tensor([False, False, True, False, False, False])
    x = torch.arange(12.0).view(6, 2)
    return Data(x=x, edge_index=edges, y=torch.tensor([0, 1, 1, 0, 0, 1]), train_mask=train, val_mask=validation, **more)


@pytest.mark.parametrize("direction", ["bidirection", "unidirection"])
def test_the_augmentation_of_six_nodes_is_the_one_written_out_by_hand(direction):
    data = six_nodes(edge_weight=torch.full((6,), 0.5), edge_attr=torch.ones(6, 3))
    features = torch.tensor([[10.0, 11.0], [12.0, 13.0]])
    augmented = AddClassNodes(direction=direction, features=features)(data)
    to_class, types = [[0, 1, 3], [6, 7, 6]], [1, 2, 1]
    if direction == "bidirection":
        to_class, types = [to_class[0] + to_class[1], to_class[1] + to_class[0]], [*types, 3, 4, 3]
    expected = torch.cat([data.edge_index, torch.tensor(to_class)], dim=1)
    assert torch.equal(augmented.edge_index, expected)
    assert augmented.edge_type.tolist() == [0] * 6 + types
    assert augmented.edge_weight.tolist() == [0.5] * 6 + [1.0] * len(types)
    assert augmented.edge_attr.tolist() == [[1.0] * 3] * 6 + [[0.0] * 3] * len(types)
    assert torch.equal(augmented.x, torch.cat([data.x, features]))
    assert augmented.y.tolist() == [0, 1, 1, 0, 0, 1, 0, 1]
    assert augmented.virtual_mask.tolist() == [False] * 6 + [True] * 2
    assert augmented.train_mask.tolist() == [True, True, False, True, False, False, False, False]
    assert augmented.val_mask.tolist() == [False, False, True] + [False] * 5
    assert augmented.num_nodes == 8
    augmented.validate()


@settings(max_examples=25, deadline=None)
@given(nodes=st.integers(3, 9), classes=st.integers(2, 3), edges=st.integers(0, 20), seed=st.integers(0, 99), both=st.booleans())
def test_removing_the_class_nodes_gives_the_graph_back(nodes, classes, edges, seed, both):
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(nodes) % classes
    data = Data(
        x=torch.randn(nodes, 4, generator=draw),
        edge_index=torch.randint(nodes, (2, edges), generator=draw),
        y=y,
        train_mask=torch.arange(nodes) < classes,
        edge_weight=torch.rand(edges, generator=draw),
        num_nodes=nodes,
    )
    before = data.clone()
    back = remove_class_nodes(AddClassNodes(direction="bidirection" if both else "unidirection")(data))
    for graph in (back, data):  # the transform changes no graph that it is given
        assert sorted(graph.keys()) == sorted(before.keys())
        for name, value in before.to_dict().items():
            assert graph[name] == value if name == "num_nodes" else torch.equal(graph[name], value)


def test_it_composes_with_pygs_transforms():
    data = six_nodes()
    del data.train_mask, data.val_mask
    composed = T.Compose(
        [T.NormalizeFeatures(), T.RandomNodeSplit(num_val=1, num_test=1), AddClassNodes(2), T.ToSparseTensor(layout=torch.sparse_csr)]
    )
    torch.manual_seed(1)
    augmented = composed(data)
    assert augmented.adj_t.shape == (8, 8)
    assert int(augmented.train_mask.sum()) == 4
    assert torch.equal(AddClassNodes(2, seed=3)(six_nodes()).x, AddClassNodes(2, seed=3)(six_nodes()).x)
    assert not torch.equal(AddClassNodes(2, seed=3)(six_nodes()).x, AddClassNodes(2, seed=4)(six_nodes()).x)


def test_label_features_tell_labels_of_training_and_class_nodes_alone():
    rows = label_features(4, torch.tensor([0, 3]), torch.tensor([1, 0]), 2, "zero", like=torch.zeros(1))
    assert rows.tolist() == [[0, 1], [0, 0], [0, 0], [1, 0]]


def test_what_cannot_be_augmented_is_refused_with_a_reason():
    with pytest.raises(ValueError, match="has class nodes already"):
        AddClassNodes()(AddClassNodes()(six_nodes()))
    with pytest.raises(ValueError, match="class 2 has no training node, so its virtual node would be isolated"):
        AddClassNodes(num_classes=3)(six_nodes())
    with pytest.raises(ValueError, match=r"features of the class nodes are \(2, 5\); expected \(2, 2\)"):
        AddClassNodes(features=torch.ones(2, 5))(six_nodes())
    with pytest.raises(ValueError, match="direction is 'both'; expected one of bidirection, unidirection"):
        AddClassNodes(direction="both")
    with pytest.raises(ValueError, match="no virtual_mask"):
        remove_class_nodes(six_nodes())
