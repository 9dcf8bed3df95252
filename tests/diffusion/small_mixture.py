"""A small mixture of Gaussians whose flow is known, and how far two samples of it are apart."""

ENDS = 20.0, 0.02


def typical(a, b) -> float:
    """The median point's error: the mean is that of the few points near the border of two components."""
    return float((a - b).norm(dim=1).median())
