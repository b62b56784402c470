"""Which images are left for a run that goes on, and when it draws its curves."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from advcl_hub.training import loop
from advcl_hub.training.loop import Loop


def rows(step: int, rank: int = 0, world: int = 1) -> list[int]:
    """What a process takes from a step on: 3 epochs of 5 batches of 4 images, of 22 images."""
    run: Any = SimpleNamespace(
        batch_size=4, world=world, rank=rank, images=22, seed=1, epochs=3, steps_per_epoch=5, state=SimpleNamespace(step=step)
    )
    parts = []
    for part in Loop.remaining_rows(run):
        parts.append(part)
        run.state.step = 5 * (run.state.step // 5 + 1)  # as the run counts on
    return torch.cat(parts).tolist() if parts else []


def test_a_run_goes_on_with_the_rest_of_its_epoch_and_all_later_ones() -> None:
    whole = rows(0)
    assert len(whole) == 60 and all(len(set(whole[epoch : epoch + 20])) == 20 for epoch in (0, 20, 40))
    assert [rows(step) for step in range(16)] == [whole[4 * step :] for step in range(16)]


def test_processes_share_every_batch() -> None:
    whole, first, second = rows(7), rows(7, 0, 2), rows(7, 1, 2)
    pairs = zip(first[::2], first[1::2], second[::2], second[1::2], strict=True)
    assert [row for batch in pairs for row in batch] == whole


def test_drawing_takes_a_twentieth_of_the_time_and_is_not_put_off_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, drawn = 0, []
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: seconds))

    def save_curves(*arguments: Any) -> None:
        nonlocal seconds
        drawn.append(seconds)
        seconds += 3

    monkeypatch.setattr(loop, "save_curves", save_curves)
    run: Any = SimpleNamespace(main=True, output=Path(), panels=(), draw_from=20, meter=SimpleNamespace(restart=int))
    while seconds < 200:
        seconds += 1
        Loop.draw(run)
    assert drawn == [21, 85, 149]
    Loop.draw(run, now=True)
    run.main = False
    Loop.draw(run, now=True)
    assert drawn == [21, 85, 149, 200]


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [
        (5, r"^batch_size 5 does not divide by 2 processes; change batch_size\.$"),
        (24, r"^A batch of 24 needs as many training images; there are 22\. Lower batch_size\.$"),
    ],
)
def test_a_batch_that_processes_cannot_share_is_refused(batch_size: int, message: str) -> None:
    accelerator: Any = SimpleNamespace(is_main_process=True, device=torch.device("cpu"), process_index=0, num_processes=2)
    settings: Any = {"images": 22, "epochs": 1, "seed": 0, "checkpoint_minutes": 5.0}
    run: Any = SimpleNamespace(losses=("total",))
    with pytest.raises(ValueError, match=message):
        Loop.__init__(run, Path(), accelerator, batch_size=batch_size, **settings)
    Loop.__init__(run, Path(), accelerator, batch_size=4, **settings)
    assert (run.world, run.steps_per_epoch) == (2, 5)


def test_only_what_a_batch_norm_says_is_explained() -> None:
    run: Any = SimpleNamespace(world=2, parts=3)
    error = ValueError("something else")
    with pytest.raises(ValueError, match="something else") as caught, Loop.explain_batch_norm(run):
        raise error
    assert caught.value is error
    with (
        pytest.raises(ValueError, match=r"\(here 2 and 3\): start with a batch_size of at least 12"),
        Loop.explain_batch_norm(run),
    ):
        torch.nn.BatchNorm1d(4)(torch.rand(1, 4))


@pytest.mark.parametrize(("device", "asked"), [("cpu", range(21)), ("cuda", (0, 10, 20))])
def test_several_gpus_agree_on_stopping_every_tenth_step(
    monkeypatch: pytest.MonkeyPatch, device: str, asked: Sequence[int]
) -> None:
    """To agree is to wait for the device."""
    monkeypatch.setattr(loop, "broadcast_object_list", lambda flags: [True, *flags[1:]])  # as the main process says
    run: Any = SimpleNamespace(world=2, device=torch.device(device), state=SimpleNamespace())
    found = []
    for run.state.step in range(21):
        found.append(Loop.agree(run, False, True))
    assert found == [(True, True) if step in asked else (False, False) for step in range(21)]
    run.world = 1
    assert Loop.agree(run, False, True) == (False, True), "nobody to ask"
