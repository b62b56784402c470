"""What a result names besides its figures: versions, hardware, and the settings that decide how it rounds."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version(), "torch": torch.__version__}  # names the build, too
    for name in ("advcl-hub", "timm", "torchvision", "numpy", "pillow", "pyautoattack"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device, processes: int) -> dict[str, Any]:
    """The device by name, threads, processes, and how the backends compute."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _processor()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "backends": backends(device),
    }


# Variables that the libraries below torch obey, whatever its flags say.
_BELOW_TORCH = ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


def backends(device: torch.device) -> dict[str, Any]:
    """What process and environment decided about arithmetic: precision of float32 products on `device`, and determinism."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    mkldnn: Any = torch.backends.mkldnn
    products, convolutions = (matmul, cudnn.conv) if device.type == "cuda" else (mkldnn.matmul, mkldnn.conv)
    # "none" asks for nothing less than float32.
    precision = [backend.fp32_precision.replace("none", "ieee") for backend in (products, convolutions)]
    return {
        "float32_matmul": precision[0],
        "float32_conv": precision[1],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": cudnn.deterministic,
        "cudnn_benchmark": cudnn.benchmark,
        **{name: os.environ[name] for name in _BELOW_TORCH if name in os.environ},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
