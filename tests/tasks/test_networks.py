"""The networks of studies: shapes, the paper's own forms, and sizes that cannot be used."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewer.tasks import conv_net, mlp, resnet18, resnet20

GROUPS = partial(nn.GroupNorm, 2)


@pytest.mark.parametrize("shape", [(1, 14, 14), (3, 32, 32), (1, 9, 12)])
@pytest.mark.parametrize(
    "make",
    [
        partial(mlp, widths=(16,)),
        partial(conv_net, widths=(4, 8)),
        partial(conv_net, widths=(4, 8, 8), norm=GROUPS, strides=(1, 2, 1), pools=(2, 1, 2)),
        partial(resnet20, widths=(4, 8, 8), norm=GROUPS, stem_stride=2),
        partial(resnet18, widths=(4, 8, 8, 8)),
    ],
)
def test_scores_are_one_a_class_whatever_the_image(make, shape):
    torch.manual_seed(0)
    model = make(shape, 7).eval()
    x = torch.randn(2, *shape)
    scores = model(x)
    assert scores.shape == (2, 7)
    assert torch.equal(copy.deepcopy(model)(x), scores)
    assert torch.allclose(model(x[:1]), scores[:1], atol=1e-5)
    model.zero_grad()
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_shortcut_without_weights_adds_what_it_drops_nothing_from():
    """The block of He et al. (option A), written out."""
    block = resnet20((1, 8, 8), widths=(2, 4, 4))[6].eval()
    x = torch.randn(3, 2, 8, 8)
    deep = block.norm2(block.conv2(F.relu(block.norm1(block.conv1(x)))))
    added = torch.cat([x[:, :, ::2, ::2], torch.zeros(3, 2, 4, 4)], dim=1)
    assert torch.allclose(block(x), F.relu(deep + added))


def test_sizes_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="images of 3 x 3 pixels are too small"):
        conv_net((1, 3, 3), widths=(4, 4), pools=(2, 2))
    with pytest.raises(ValueError, match="2 widths, 1 strides and 2 pools"):
        conv_net((1, 8, 8), widths=(4, 4), strides=(2,))
    with pytest.raises(ValueError, match=r"widths\[1\] is 0"):
        mlp((1, 8, 8), widths=(4, 0))
