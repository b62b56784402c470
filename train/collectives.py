"""What one process communicates: every collective operation, those of DistributedDataParallel included."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """One operation: its name in namespace `c10d` (`allreduce_`, `allgather_`, ...), and the bytes that this process gave."""

    name: str
    bytes: int


class Collectives(TorchDispatchMode):
    """Records the collective operations that this process starts inside a `with` block.

        with Collectives() as collectives:
            step()
        collectives.bytes["allreduce_"]

    Bytes are those of the inputs: one tensor for an all-reduce, however many processes there are; of an all-gather what this
    process sends, not what it receives. Backward passes count if they run in the calling thread, of which
    `torch.autograd.set_multithreading_enabled(False)` makes sure.

    Attributes:
        records: the operations in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Collective] = []

    @property
    def bytes(self) -> Counter[str]:
        """Total bytes by name; 0 for an operation that did not run."""
        total = Counter[str]()
        for name, count in self.records:
            total[name] += count
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | kwargs
            inputs = [value for name, value in given.items() if not name.startswith("output")]
            self.records.append(Collective(func._schema.name.removeprefix("c10d::"), sum(t.nbytes for t in _tensors(inputs))))
        return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
