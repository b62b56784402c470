"""How many epochs of a finetuning fit its share: analytic cases, and the watch that stops one that is too long."""

import json
from pathlib import Path

import pytest

from advcl_hub.training.stop import StopRequest
from train.fitting import FitWatch, fitting_epochs, timed_records, trained_seconds


def records(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """A log: epochs, and the seconds of training until then."""
    return [{"step": i, "epoch": epoch, "seconds": seconds} for i, (epoch, seconds) in enumerate(pairs)]


def write_log(folder: Path, *pairs: tuple[float, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records(*pairs)]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("log", "share", "spent", "expected"),
    [
        ([(0.1, 3.0), (3.1, 15.0)], 43.5, 20.0, 10),  # 4 s an epoch: 6.9 epochs, 27.6 s, are left to do, in 27.85 s
        ([(0.1, 3.0), (3.1, 15.0)], 43.0, 20.0, 4),  # a new run has 23 s, of which 5 are for its start
        ([(0.1, 3.0), (3.1, 15.0)], 1000.0, 20.0, 10),
        ([(0.1, 3.0), (3.1, 15.0)], 1.0, 20.0, 1),  # nothing fits: still one
        ([(0.1, 3.0), (9.9, 42.2)], 40.0, 50.0, 10),  # over its share, but done in less than a new start takes
        ([(0.1, 1.4), (0.2, 1.5)], 57.6, 19.0, None),  # a tenth of a second tells nothing
        ([(0.1, 1.4)], 57.6, 50.0, None),  # nor do the first steps, in which the device chooses algorithms
        ([(0.1, 1.0), (0.2, 1.3)], 2.4, 9.0, 1),  # of a short share a tenth of it is enough
        ([], 1.0, 8.0, None),
    ],
)
def test_all_epochs_or_as_many_as_fit(log: list[tuple[float, float]], share: float, spent: float, expected: int | None) -> None:
    assert fitting_epochs(records(*log), 10, share, spent) == expected


def test_a_start_that_takes_most_of_the_share_does_not_cost_epochs() -> None:
    """A linear head on an H100, 2026-11-27: 18 s to start, 0.8 s an epoch, a share of 57.6 s. It was cut to one epoch."""
    measured = records((0.25, 1.36), (12.75, 11.4))
    assert fitting_epochs(measured, 25, 57.6, 18 + 11.4) == 25


def test_what_a_new_run_does_not_repeat_is_not_counted_for_it() -> None:
    """LP-AFF after 42 s for its head, 18 to start, then 12 s an epoch: 75 of 172.8 s are gone, and a new start takes 18."""
    measured, spent = records((0.1, 3.0), (1.1, 15.0)), 42 + 18 + 15.0
    assert fitting_epochs(measured, 20, 172.8, spent, once=42.0) == int((172.8 - 75 - 18) / 12) == 6
    assert fitting_epochs(measured, 20, 172.8, spent) == int((172.8 - 75 - 60) / 12) == 3


DAMAGED = ["", "{", "\xff", '{"seconds": 20}\n{"epoch": 3}', '{"seconds": "1", "epoch": 2}\n3\n{"seconds": NaN, "epoch": 1}']


@pytest.mark.parametrize("lines", DAMAGED)
def test_what_tells_no_time_is_passed_over(lines: str, tmp_path: Path) -> None:
    """Whatever a log holds, it does not end the training that it is read for."""
    (tmp_path / "log.jsonl").write_bytes(lines.encode("latin-1"))
    assert timed_records(tmp_path) == [] and trained_seconds(tmp_path) == 0
    assert not FitWatch(StopRequest(), tmp_path, 10, share=1.0).requested
    (tmp_path / "log.jsonl").write_text('{"val_robust": 0.1}\n{"epoch": 2, "seconds": 3}\n', encoding="utf-8")
    assert timed_records(tmp_path) == [{"epoch": 2, "seconds": 3}] and trained_seconds(tmp_path) == 3


def test_a_stop_is_asked_for_once_the_log_shows_that_not_all_epochs_fit(tmp_path: Path) -> None:
    stop = StopRequest()
    fit = FitWatch(stop, tmp_path / "run", 10, share=50.0)
    assert not fit.requested and fit.fits is None and fit.remaining == float("inf")
    write_log(tmp_path / "run", (0.1, 3.0), (0.6, 13.0))  # 20 s an epoch
    assert fit.requested and fit.too_long and fit.fits == 2 and not stop.requested


def test_what_fits_once_is_not_asked_again(tmp_path: Path) -> None:
    """Late in a training, one slow moment must not throw away all of it."""
    fit = FitWatch(StopRequest(), tmp_path, 10, share=1000.0)
    write_log(tmp_path, (0.1, 3.0), (3.1, 15.0))
    assert not fit.requested and fit.fits == 10
    write_log(tmp_path, (0.1, 3.0), (3.1, 15.0), (3.2, 900.0))
    assert not fit.requested and not fit.too_long


def test_the_seconds_of_an_earlier_call_count(tmp_path: Path) -> None:
    """After 60 s, 2 of 10 epochs, of which 30 s come from LP-AFF's head: of 200 s, 110 are left for epochs of 30."""
    write_log(tmp_path / "head", (2.0, 30.0))
    write_log(tmp_path / "full", (0.0, 0.1), (2.0, 60.0))
    fit = FitWatch(StopRequest(), tmp_path / "full", 10, 200.0, [tmp_path / "head"])
    assert not fit.requested and fit.fits is None  # what an earlier call saw is no reason: this one has not trained yet
    write_log(tmp_path / "full", (0.0, 0.1), (2.0, 60.0), (2.1, 63.0))
    assert fit.requested and fit.fits == 3  # (200 - 90 - 3) / 30, but for the milliseconds since


def test_a_call_that_ends_stops_the_training_too(tmp_path: Path) -> None:
    stop = StopRequest()
    fit = FitWatch(stop, tmp_path, 10, share=1000.0)
    stop.signalled = True
    assert fit.requested and not fit.too_long
