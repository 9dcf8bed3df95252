"""Find the few Walsh-Hadamard coefficients that matter from O(K log N) chosen queries, with noise: SPRIGHT.

Any function of n bits is a sum of N = 2^n parities, f(m) = sum_k X[k] (-1)^<k,m>. When only K of them matter, this finds them without
ever looking at N points: n = 200 works. For people who explain a black-box model by its interactions (each query is a model call),
learn Boolean functions, sketch graphs from cut queries, or compress switching functions.

When to use it: queries can be chosen, and few parities carry f, among too many to list. When not: examples are given and cannot be
chosen; or f is known to hold single variables and pairs of few variables alone, where asking each pair costs less.

- Subsampling: group c looks at f(M_c l + d), l in {0,1}^b; its 2^b-point transform adds up in bin j the coefficients with M_c^T k = j,
  each with the sign (-1)^<d,k> for the offset d.
- A bin with one coefficient gives it away: the signs over all offsets are its signature. It is read from flipped single bits ("nso",
  "none") or as the codeword of a convolutional code through a noisy channel ("so"), and verified on all offsets.
- Peeling: it is subtracted in the other groups, where that uncovers the next ones.

The first call after an installation compiles for some seconds; what is compiled is kept.

Source: arXiv 1508.06336.

>>> import numpy as np
>>> from fewer.signals import sparse_wht
>>> def model(m): return m[:, 3] * m[:, 71] - 0.5 * m[:, 90]  # any function of rows of bits
>>> spectrum = sparse_wht(model, n=100, sparsity=5)
>>> interactions = dict(spectrum.interactions([f"x{i}" for i in range(100)]))
>>> round(interactions["x3", "x71"], 6), round(interactions["x90",], 6)
(0.25, 0.25)
>>> spectrum.converged, spectrum.queries < 9_000
(True, True)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
