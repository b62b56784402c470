"""A caller's modes of torch, which would change what the library computes: switched off, and on again afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def as_usual() -> Iterator[None]:
    """A caller's modes switched off: inference mode, no_grad, autocast, and another default dtype or device.

    They would change what is computed, and no record would say so.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            # torch keeps the bfloat16 copies of weights until the outermost autocast ends, which is this one: autocast inside
            # would compute with the weights of the first step to the end. It inherits that nothing is kept.
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield
