"""A network that stands beside the one that is trained, such as a teacher."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Companion(nn.Module):
    """A network in evaluation mode with constant parameters, which no optimizer, checkpoint or gradient exchange sees.

    It moves with the module that holds it (device, type, memory format) and is copied with it, but it has no parameters,
    buffers or state of its own: a checkpoint does not grow by it, and whoever continues a run makes it again.

    Args:
        network: takes images or features; it is changed in place.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._hidden = (network.eval().requires_grad_(False),)  # in a tuple torch does not register it

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        return self._hidden[0]

    def forward(self, x: Tensor) -> Tensor:
        """What the network makes of `x`; gradients with respect to `x` flow."""
        return self.network(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.network._apply(fn, recurse)
        return super()._apply(fn, recurse)
