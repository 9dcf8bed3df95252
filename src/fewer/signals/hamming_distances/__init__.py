"""How far a pattern is from every window of a text, for any alphabet: exactly, up to k, or within a factor.

For people who look for motifs and primers in DNA, for test passages in training data with a few words changed, for patterns in logs and
in symbolised sensor data. It takes the place of comparing the pattern with every window, and of one correlation a letter.

When to use it: text and pattern are letters (integers, characters, bytes) and every shift matters. When not: letters may be inserted or
left out (that is the edit distance), numbers are compared by size, or an exact substring is looked for, which `str.find` does.

- Distances are m less the matches, and the matches of each letter are added up: by pairs of positions (rare letters), by bit vectors and
  vertical counters (64 windows in a word), by transforms whose spectra are summed before one is taken back, or by plain comparison.
- What each costs is measured once on the machine; the letters with the most pairs go by bits or transforms, the others by pairs, where
  the sum of the predictions is least. For sqrt(m) letters of equal frequency that is O(n sqrt(m log m)).
- Every answer is checked: the sum over all windows is known beforehand, and some windows are compared.
- Up to k: windows are left at the (k + 1)-th mismatch, with a budget. Within a factor: letters are hashed, again and again.

The paper's own algorithm (O(n sqrt m), by a lemma on sumsets) is not built, for no machine would notice its gain; see the card.
The first call after an installation compiles and measures for some seconds; what is found is kept.

Source: arXiv 2310.13174.

>>> from fewer.signals.hamming_distances import hamming_distances
>>> hamming_distances("GATTACA", "TAC").tolist()
[2, 3, 2, 0, 3]
>>> hamming_distances([5, 1, 5, 5, 2], [5, 5]).tolist()
[1, 1, 0, 1]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
