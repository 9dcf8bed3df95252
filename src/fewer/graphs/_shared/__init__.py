"""What methods on graphs share: layers of PyG's convolutions, readers of graphs, pairs to be judged, and the twins trained by backpropagation."""
