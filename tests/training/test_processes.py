"""Who shares a task, and on which device."""

import pytest

from advcl_hub.training.processes import join


@pytest.mark.parametrize("device", ["cuda:1", "meta", "mps"])
def test_one_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = f"^The device {device} cannot be shared by several processes: leave it out, or say cpu\\.$"
    with pytest.raises(ValueError, match=message):
        join(device)
