"""What a result names besides its figures, on machines and with packages that others lack."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from advcl_hub.records.environment import hardware, versions


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without_autoattack(name: str) -> str:
        if name == "pyautoattack":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_autoattack)
    found = versions()
    assert set(found) == {"python", "torch", "advcl-hub", "timm", "torchvision", "numpy", "pillow"}
    assert found["torch"] == torch.__version__ and found["timm"] == version("timm")


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    found = hardware(torch.device("cuda:1"), 2)
    assert (found["device"], found["name"], found["processes"]) == ("cuda", "a GPU at cuda:1", 2)


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "name"),
    [
        ("processor\t: 0\nmodel name\t: A CPU: 2 GHz\nmodel name\t: another", "x86_64", "A CPU: 2 GHz"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", "", "aarch64"),  # Linux on ARM names none
        (None, "arm", "arm"),  # other systems have no such file
        (None, "", "aarch64"),
    ],
)
def test_a_processor_is_named_as_well_as_the_system_can(
    cpuinfo: str | None, processor: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, **options: Any) -> str:
        assert path == Path("/proc/cpuinfo")
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", read_text)
        found = hardware(torch.device("cpu"), 1)
    assert (found["device"], found["name"]) == ("cpu", name)
