"""A growing archive of videos in one network, each a sparse subnetwork of it; earlier videos decode bit for bit as before: PFNR.

A neural codec stores a video as the weights of a network. A library of videos then needs a network each, or training anew on all of them
whenever one arrives. Here a new video picks the weights that it computes with, may reuse all that earlier videos use, and trains the free
ones alone.

When to use it: videos of one size arrive one after the other, the old ones need not be kept, and decoding must not change. When not: bytes
or quality are to be the best (H.264 has both), videos must be encoded in real time, or the number of videos cannot be bounded beforehand.

- Every weight has a score; the share c of highest scores of each tensor is the video's mask. Backward it is passed over.
- The gradient of every weight that an earlier video uses is set to 0 before Adam's step, so it is never moved by a bit. Scores move on.
- The Fourier subneural operator multiplies the lowest frequencies of a feature map by masked complex weights and scales it up by zeros.
- A file holds the weights in use, quantised once a video, and a bit an entry and video for the masks.

Source: arXiv 2306.11305 and its released code.

>>> import torch
>>> from fewer.signals import PFNRConfig, VideoArchive
>>> config = PFNRConfig(16, 16, max_sessions=2, grid=(4, 4), grid_channels=8, stem=16, strides=(2, 2), widths=(8, 8))
>>> archive = VideoArchive(config, torch.Generator().manual_seed(0))
>>> first, second = torch.randint(256, (2, 3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
>>> _ = archive.add(first, "first", epochs=2, loss="mse")
>>> before = archive.decode("first")
>>> _ = archive.add(second, "second", epochs=2, loss="mse")
>>> torch.equal(archive.decode("first"), before)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
