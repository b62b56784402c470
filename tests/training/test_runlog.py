"""What a run leaves to read: log, meter, curves, progress lines; and the words for a time budget."""

import io
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from advcl_hub.training.progress import progress_bar
from advcl_hub.training.runlog import LOG, Meter, RunLog, read_log, save_curves
from train.pretrain import panels

pytestmark = pytest.mark.usefixtures("rendered")

PANELS = panels(("total", "contrastive", "pseudo_label"))


def test_continuing_drops_what_was_logged_after_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, loss=step / 3)
    log.close()
    with (tmp_path / LOG).open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    assert [r["step"] for r in read_log(tmp_path)] == [1, 2, 3]
    log = RunLog(tmp_path, 2)
    log.write(3, loss=0.5)
    log.close()
    assert [json.loads(line) for line in (tmp_path / LOG).read_text(encoding="utf-8").splitlines()] == [
        {"step": 1, "loss": 0.333333},
        {"step": 2, "loss": 0.666667},
        {"step": 3, "loss": 0.5},
    ]


def test_the_meter_means_over_steps_and_starts_anew() -> None:
    meter, accelerator = Meter(torch.device("cpu"), 3), Accelerator(cpu=True)
    for value in (1.0, 3.0):
        meter.add(torch.tensor([value, 2 * value, 0.0]))
    means, steps, seconds = meter.take(accelerator)
    assert (means, steps) == ([2.0, 4.0, 0.0], 2) and 0 <= seconds < 60
    meter.add(torch.tensor([7.0, 0.0, 0.0]))
    assert meter.take(accelerator)[:2] == ([7.0, 0.0, 0.0], 1)


def test_curves_are_drawn_with_and_without_records(tmp_path: Path) -> None:
    empty = Image.open(save_curves(tmp_path, PANELS)).convert("RGB").tobytes()
    log = RunLog(tmp_path, 0)
    for step in (1, 2):
        log.write(step, epoch=step, total=1 / step, lr=0.1, probe_standard=0.5, probe_robust=0.2)
    log.close()
    drawn = Image.open(save_curves(tmp_path, PANELS)).convert("RGB").tobytes()
    assert drawn != empty
    log = RunLog(tmp_path, 0)
    log.write(1, epoch=1, total=1.0, probe_standard=0.5)
    log.close()
    without = Image.open(save_curves(tmp_path, PANELS)).convert("RGB").tobytes()
    log.write(1, epoch=1, probe_robust=0.0)
    assert Image.open(save_curves(tmp_path, PANELS)).convert("RGB").tobytes() != without, "a collapse is seen, not hidden"


def test_progress_in_a_log_file_is_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    bar = progress_bar(total=4, initial=1, unit="step", desc="work")
    bar.update(3)
    bar.close()
    text = log.getvalue()
    assert "\r" not in text and "\n\n" not in text
    lines = text.splitlines()
    assert lines[0].startswith("work:  25%") and lines[-1].startswith("work: 100%") and "4/4" in lines[-1]


def test_in_a_terminal_the_bar_is_one_line_that_overwrites_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    bar = progress_bar(total=4, desc="work")
    bar.update(4)
    bar.close()
    first, *_, last = terminal.getvalue().split("\rwork:")
    assert not first.strip() and last.startswith(" 100%") and "4/4" in last
    assert terminal.getvalue().count("\n") == 1 and last.endswith("\n")
