"""Keeps the environment and earlier Accelerators of this process from changing how accelerate runs a training."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

# Each asks accelerate for an engine that we do not support.
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism",
}
# They change the device, which is recorded, or speed and messages alone. All others that begin like them are hidden: several
# override an argument (ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides every gradient), and versions add new ones.
_LEFT = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_ENABLE_RICH",
    "ACCELERATE_LOG_LEVEL",
)


def switched_on(name: str) -> bool:
    """Returns whether an environment variable says yes, in the words that accelerate knows."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "t", "y")


def refuse_engines() -> None:
    """Raises ValueError if the environment, or an earlier Accelerator of this process, asks for another way of training."""
    for name, engine in _ENGINES.items():
        if switched_on(name):
            raise ValueError(
                f"{name} is {os.environ[name]}, but {engine} is not supported here: unset the variable. (accelerate launch "
                "sets it from its configuration file; torchrun does not.)"
            )
    kind = getattr(PartialState._shared_state.get("distributed_type"), "value", "NO")
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise ValueError(
            f"An Accelerator of this process trains with {kind}, which is not supported here: start a new process."
        )


@contextmanager
def hidden_variables() -> Iterator[None]:
    """Hides accelerate's environment variables in a `with` block, but for those that do not change what is computed."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("ACCELERATE_") and name not in _LEFT}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def undisturbed(accelerator: Accelerator | None = None) -> Iterator[None]:
    """Lets accelerate see no variables, and no state but ours, in a `with` block.

    accelerate keeps precision and accumulation for the whole process: what an earlier Accelerator chose would count for ours,
    and ours for a later one. Afterwards both are as they were.

    Args:
        accelerator: whose state it sees; without one, none, as if the process were new.
    """
    shared = [AcceleratorState._shared_state, GradientState._shared_state]
    ours = [vars(accelerator.state), vars(accelerator.gradient_state)] if accelerator else [{}, {}]
    earlier = [dict(state) for state in shared]
    _fill(shared, ours)
    try:
        with hidden_variables():
            yield
    finally:
        _fill(shared, earlier)


def _fill(shared: list[dict[str, object]], contents: list[dict[str, object]]) -> None:
    for state, content in zip(shared, [dict(content) for content in contents], strict=True):
        state.clear()
        state.update(content)


def detach(accelerator: Accelerator) -> None:
    """Gives an Accelerator a state of its own instead of the one that all of a process share."""
    for state in (accelerator.state, accelerator.gradient_state):
        state.__dict__ = dict(vars(state))
