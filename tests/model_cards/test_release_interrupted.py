"""Releasing weights when the disk is full or the process is killed: nothing is lost, and the same command goes on."""

import errno
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from advcl_hub.files import is_draft, lock, replacing
from tests.support.checkouts import NAME, files, loaded, run
from tests.support.hub_client import Client
from tests.support.slow import slow
from tests.support.small_encoders import SMALL_RESNET, export_encoder, export_head


def cut_off(checkout: Path, how: str, moment: int, *arguments: object) -> bool:
    """Whether the script, in a copy of this process, ended by itself and not at a moment.

    Args:
        checkout, arguments: see `run`.
        how: by "kill -9" or with "full" as the answer of the file system, at the change of a file with number `moment`.
    """
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    changes, watched = 0, {"full": ("shutil.copyfile", "os.rename"), "kill -9": ("shutil.copyfile", "os.rename", "os.remove")}

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        if event in watched[how] and str(checkout) in str(args):
            changes += 1
            if changes == moment and how == "kill -9":
                os.kill(os.getpid(), signal.SIGKILL)
            if changes == moment:
                raise OSError(errno.ENOSPC, "No space left on device")

    try:
        sys.addaudithook(watch)
        os._exit(1 if run(checkout, *arguments) or changes >= moment else 0)
    finally:
        os._exit(2)


def hidden(checkout: Path) -> list[Path]:
    return [path for path in checkout.rglob(".*") if path.name.startswith(".release-") or is_draft(path)]


def output_or_refusal(checkout: Path, cache: Path) -> torch.Tensor | None:
    """What the release computes; None if its files are refused because they are not those of released.json."""
    try:
        return loaded(checkout, cache)
    except (ValueError, OSError):
        return None


CHANGES = ("other weights", "other weights in parts", "out of its folder", "into its folder", "to a head")
QUICK = (CHANGES[0], "full")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    ("what", "how"),
    [QUICK, *(slow(what, how) for what in CHANGES for how in ("kill -9", "full") if (what, how) != QUICK)],
)
def test_wherever_it_stops_nothing_is_lost_and_the_same_command_goes_on(
    what: str, how: str, small: Path, client: Client, tmp_path: Path, limit: Callable[[int], None]
) -> None:
    """A call that is killed leaves the old release, the new one or, between two renames, one that is refused, and the next call
    puts that right. A call that the file system refuses leaves the old one or the new one itself."""
    home, other = small / "advcl_hub/hub/weights" / NAME, tmp_path / "encoder"
    if what.startswith("other"):
        other = export_encoder(tmp_path / "other", "resnet20_cifar", seed=1, **SMALL_RESNET)
    if what in ("other weights in parts", "into its folder"):
        limit(0)
        assert client(run, small, home, NAME) == ""
        home = small / "model_cards/weights" / NAME
    if what.endswith("its folder"):
        limit(0 if what == "out of its folder" else 1_000_000)
    command: tuple[object, ...] = (home if what.endswith("its folder") else other, NAME, "--replace")
    if what == "to a head":  # a classifier that is stored whole, until its encoder comes, too
        head = export_head(tmp_path / "encoder", tmp_path / "head", 1, **SMALL_RESNET)
        assert client(run, small, head, NAME, "--replace") == ""
        command = (tmp_path / "encoder", f"{NAME}_encoder", home, NAME)
    shutil.copytree(small, tmp_path / "before")
    old = client(loaded, small, tmp_path / "cache")
    assert client(run, small, *command) == ""
    after = files(small)
    new = client(loaded, small, tmp_path / "cache")
    assert torch.equal(old, new) == (what.endswith("its folder") or what == "to a head")
    for moment in itertools.count(1):
        shutil.rmtree(small)
        shutil.copytree(tmp_path / "before", small)
        ended = client(cut_off, small, how, moment, *command)
        found = client(output_or_refusal, small, tmp_path / "cache")
        assert how != "full" if found is None else any(torch.equal(found, output) for output in (old, new)), moment
        assert how != "full" or not hidden(small), moment
        if ended:
            break
        assert client(run, small) == "" and not hidden(small), moment  # any next call
        found = client(loaded, small, tmp_path / "cache")
        assert torch.equal(found, old) or torch.equal(found, new), moment
        if Path(str(command[0])).is_dir():  # else all was done, and its source has gone
            assert client(run, small, *command) == "", moment
        assert files(small) == after and not hidden(small), moment
    assert moment > 7


def test_what_a_killed_call_left_is_removed_and_two_calls_do_not_meet(small: Path, client: Client) -> None:
    before = files(small)
    rooms = ("model_cards", "advcl_hub/hub/weights", "advcl_hub/hub")
    left = [small / room / ".release-draft-ab_12xyz/config.json" for room in rooms]
    readme = small / "model_cards" / NAME / "README.md"
    with replacing(readme) as draft:
        shutil.copyfile(readme, draft)
    left.append(draft)
    others = [small / "model_cards/.release-notes", small / ".hidden/README.md", small / ".2026-11-notes.txt"]
    others += [small / ".2026-11-folder/file", small / "model_cards/.release-draft-mystuff1/notes.txt"]
    for path in left + others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x", encoding="utf-8")
    with (small / "model_cards/release.py").open(encoding="utf-8") as program:
        assert lock(program)
        assert "Another call of this command works in" in client(run, small)
    assert all(path.is_file() for path in left)
    assert client(run, small) == ""
    assert files(small) == before | {str(path.relative_to(small)): b"x" for path in others}
