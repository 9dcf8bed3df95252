"""How layers learn each for itself: one class a mode, all of the same protocol."""

from __future__ import annotations

from fewer.graphs.forward_gnn.modes.forward_forward import ForwardForward
from fewer.graphs.forward_gnn.modes.mode import Mode
from fewer.graphs.forward_gnn.modes.single_forward import SingleForward
from fewer.graphs.forward_gnn.modes.top_to_input import TopToInput
from fewer.graphs.forward_gnn.modes.top_to_loss import TopToLoss

MODES: dict[str, Mode] = {
    "single": SingleForward(),
    "top_to_input": TopToInput(),
    "top_to_loss": TopToLoss(),
    "ff_labels": ForwardForward(by_label=True),
    "ff_virtual": ForwardForward(by_label=False),
}
