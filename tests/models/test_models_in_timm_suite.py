"""timm's own tests/test_models.py, of the installed version, run on our architectures and weights.

timm ships its tests in the source distribution only, which pip downloads once into `.cache/`.
"""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest
import timm

from advcl_hub import releases
from tests.support import ROOT
from tests.support.hub_server import serve_hub
from tests.support.small_encoders import export_encoder
from tests.support.timm_suite_plugin import OURS

# What timm has tested on every architecture since 1.0.20.
ON_EVERY_MODEL = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_torchscript",
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}
ON_ALL_WEIGHTS = {"test_model_load_pretrained", "test_model_features_pretrained"}
# timm calls this test slow and leaves it out of its own CI. wrn28_10_cifar, of the same class, runs it.
LEFT_OUT = "test_prune_intermediate_layers_contract[wrn34_10_cifar]"


def source_distribution() -> Path:
    """The archive of the installed timm, downloaded if it is not there yet."""
    cache = ROOT / ".cache"
    archive = cache / f"timm-{timm.__version__}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
        command += ["--dest", str(cache), f"timm=={timm.__version__}"]
        download = subprocess.run(command, capture_output=True, text=True, timeout=300, encoding="utf-8")
        if download.returncode or not archive.exists():
            reason = (download.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            pytest.skip(f"the source distribution of timm {timm.__version__} cannot be downloaded: {reason}")
    return archive


def unpack_suite(folder: Path) -> Path:
    """Puts timm's test file, and the configuration with its markers, into `folder`; returns the test file."""
    top = f"timm-{timm.__version__}"
    with tarfile.open(source_distribution()) as archive:
        for name in ("pyproject.toml", "tests/test_models.py"):
            archive.extract(f"{top}/{name}", folder, filter="data")
    return folder / top / "tests" / "test_models.py"


def passed_tests(report: Path) -> dict[str, set[str]]:
    """The test functions that passed, by the architecture they ran on."""
    passed = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        function, _, parameters = case.get("name", "").partition("[")
        if not any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped")):
            passed[parameters.rstrip("]").rsplit("-", 1)[-1]].add(function)
    return dict(passed)


@pytest.mark.slow
def test_timm_suite_passes_on_our_models(tmp_path: Path) -> None:
    """Also on weights that lie on a Hub, of an architecture of ours and of one of timm's own."""
    suite = unpack_suite(tmp_path)
    export_encoder(tmp_path / "hub/acme/resnet", "resnet20_cifar", num_classes=10)
    export_encoder(tmp_path / "hub/acme/convnext", "convnext_atto", patch_size=1, depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
    tags = {"resnet20_cifar.hub": "hf-hub:acme/resnet", "convnext_atto.hub": "hf-hub:acme/convnext"}
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["-p", "timm_suite_plugin", "--deselect", f"tests/test_models.py::{LEFT_OUT}"]
    command += ["--disable-warnings", f"--junitxml={report}", str(suite)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), *sys.path])
    environment |= {"HF_HOME": str(tmp_path / "home"), "ADVCL_TEST_TAGS": " ".join(f"{n}={s}" for n, s in tags.items())}
    with serve_hub(tmp_path / "hub") as address:
        environment["HF_ENDPOINT"] = address
        run = subprocess.run(command, cwd=suite.parents[1], env=environment, capture_output=True, text=True, encoding="utf-8")

    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = passed_tests(report)
    assert passed.keys() == OURS | tags.keys() | releases().keys()
    for name, functions in passed.items():
        expected = ON_EVERY_MODEL if name in OURS else ON_ALL_WEIGHTS
        assert functions >= expected, f"did not run on {name}: {sorted(expected - functions)}"
