"""Train graph neural networks layer by layer: no gradient crosses a layer, and the classes are nodes of the graph.

A virtual node for each class is joined to the training nodes of that class. Each layer then learns to tell them apart by its own
output, in one forward pass and without negative examples:

- SF ("single"): h = GNN(norm(x)), logits h_node h_class^T / temperature, cross-entropy; layer l is trained, frozen, then layer l + 1.
- SF-Top-to-Input, SF-Top-to-Loss: all layers at every step; a layer also reads, or its loss also sees, what the layers above said.
- Forward-Forward baselines ("ff_labels", "ff_virtual"), link prediction, and the twin that is trained by backpropagation.

When to use it: the activations of all layers of a full-batch graph network do not fit, or layers shall be trained apart from each
other. When not: the activations fit and the last point of accuracy counts.

Source: Forward Learning of Graph Neural Networks, ICLR 2024, arXiv 2403.11004.

>>> import torch
>>> from torch_geometric.datasets import KarateClub
>>> from torch_geometric.transforms import RandomNodeSplit
>>> from fewer.graphs import ForwardGNN
>>> _ = torch.manual_seed(0)
>>> data = RandomNodeSplit(num_val=6, num_test=8)(KarateClub()[0])
>>> model = ForwardGNN(data.num_features, hidden_channels=32, num_layers=2, num_classes=4, conv="gcn")
>>> history = model.fit(data, lr=1e-2)
>>> list(history.best)
['layer 1', 'layer 2']
>>> float((model.predict(data, data.test_mask) == data.y[data.test_mask]).float().mean()) > 0.7
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
