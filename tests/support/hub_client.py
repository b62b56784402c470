"""The real Hub client, in a process of its own that was started with the addresses of a test's Hub."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import warm
from tests.support.hub_server import Hub

WRITER = "hf_writer"
TOKENS: dict[str, tuple[Any, ...]] = {
    WRITER: ("alice", ["acme"]),
    "hf_reader": ("alice", ["acme"], "read"),
    "hf_stranger": ("bob",),
}


class _Impatient:
    """The module `time`, for the client: it waits up to 8 seconds before each of its five tries, and here nobody will come."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 1000)


def _start(environment: Mapping[str, str]) -> None:
    warm.enter(environment)
    hurry()


def hurry() -> None:
    """In this process the client waits a thousandth of the time before it tries again."""
    from huggingface_hub.utils import _http

    assert vars(_http)["time"] is time, "the client waits in another way"
    setattr(_http, "time", _Impatient())  # noqa: B010  # mypy refuses to assign to a module


def nobody() -> Hub:
    """The address of a Hub at which nothing listens."""
    hub = Hub()
    hub.endpoint = "http://127.0.0.1:9"
    return hub


def _call(environment: Mapping[str, str], function: Callable[..., Any], args: Any, options: Any) -> Any:
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(environment)
    return function(*args, **options)


class Client:
    """Calls functions in the other process; importing timm is paid for once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool = pool

    def __call__(self, function: Callable[..., Any], *args: Any, token: str | None = WRITER, **options: Any) -> Any:
        environment = {"HF_TOKEN": token} if token else {}
        return warm.result(self.pool.submit(_call, environment, function, args, options))


@contextmanager
def open_client(hub: Hub, home: Path, **variables: str) -> Iterator[Client]:
    """A process that knows `hub`, with caches of its own in `home`."""
    environment = hub.environment(home) | variables
    with ProcessPoolExecutor(1, warm.CONTEXT, _start, (environment,)) as pool:
        yield Client(pool)
