"""A trained network as C99: read from torch or ONNX as layers, its buffers planned, each layer written as a function."""
