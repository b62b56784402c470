"""Signals ask for a stop, a second Ctrl-C interrupts, and afterwards they do what they did."""

import argparse
import signal
import threading
from collections.abc import Iterator

import pytest

from advcl_hub.training.stop import StopRequest, duration


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """A signal that nothing handles ends the test and not pytest."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert capsys.readouterr().err == "\nStopping after this step, with a checkpoint.\n"
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_does_not() -> None:
    asked = []
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            asked.append(stop.requested)
    assert asked == [True, True]


def test_a_budget_asks_for_a_stop_when_it_is_spent() -> None:
    assert StopRequest(0).requested and StopRequest(-1).requested
    assert not StopRequest(1000).requested and 0 < StopRequest(1000).remaining <= 1000
    assert StopRequest().remaining == float("inf")


def test_in_a_thread_signals_stay_as_they_are() -> None:
    handlers = []

    def work() -> None:
        with StopRequest():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_durations() -> None:
    assert [duration(text) for text in ("90s", "1.5m", "2h")] == [90, 90, 7200]
    for text in ("", "90", "s", "-1s", "infh", "1d", "nanm"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a duration such as 90s, 9m or 2h"):
            duration(text)
