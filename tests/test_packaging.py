"""What a newcomer meets first: the metadata, the wheel, and `make` on a fresh machine."""

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import advcl_hub
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# ------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("torch", ["2.9.0", "2.11.0", "2.13.0+cpu", "2.14.1"], ["2.8.0"]),
        ("torchvision", ["0.24.0", "0.29.1"], ["0.23.0"]),
        ("timm", ["1.0.31"], ["1.0.30"]),
        ("huggingface-hub", ["1.27.0", "1.33.0", "2.4.0"], ["1.26.1"]),
    ],
)
def test_dependency_ranges(name: str, accepted: list[str], refused: list[str]) -> None:
    requirement = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == name)
    assert [v for v in accepted + refused if requirement.specifier.contains(v)] == accepted


def test_installed_packages_are_in_the_declared_ranges() -> None:
    extras = [r for extra, packages in PROJECT["optional-dependencies"].items() if extra != "dev" for r in packages]
    declared = PROJECT["dependencies"] + extras
    versions = {r: importlib.metadata.version(r.name) for r in map(Requirement, declared)}
    assert not {str(r): v for r, v in versions.items() if not r.specifier.contains(v, prereleases=True)}


def test_a_checkout_that_was_never_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    spec = importlib.util.spec_from_file_location("never_installed", advcl_hub.__file__)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert module.__version__ == "0+unknown" != advcl_hub.__version__


def test_completion_offers_what_is_imported_at_its_first_use() -> None:
    offered = dir(advcl_hub)
    assert {"Protocol", "convert", "evaluate", "finetune", "lp_aff", "pull", "push", "transfer", "verify"} < set(offered)
    assert {"__version__", "releases"} < set(offered) and all(hasattr(advcl_hub, name) for name in offered)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="builds the wheel with hatchling: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


def test_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"advcl_hub-{PROJECT['version']}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    library = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("advcl_hub/**/*") if p.is_file()}
    info = f"advcl_hub-{PROJECT['version']}.dist-info"
    assert {n for n in names if not n.startswith(info)} == {n for n in library if "__pycache__" not in n}
    assert f"{info}/licenses/LICENSE" in names


# What somebody meets who typed `pip install advcl-hub` without extras: each line is a call, and how it ends.
INSTALLED = """
import importlib.util, os, pathlib, pkgutil, sys, warnings
import click.testing, timm, torch
import advcl_hub
from advcl_hub.cli import main
from advcl_hub.data import load_data
from advcl_hub.evaluation import adversarial_images, robustness
from advcl_hub.hub.cards import add_to_results, card, write_card
from advcl_hub.pretraining import AdvCL, make_pseudo_labels
from advcl_hub.records import load_record
from advcl_hub.records.tables import report

assert pathlib.Path(advcl_hub.__file__).parents[1] == pathlib.Path(sys.argv[1])
assert importlib.util.find_spec("train") is None and importlib.util.find_spec("model_cards") is None
for module in pkgutil.walk_packages(advcl_hub.__path__, "advcl_hub."):
    if module.name.endswith("__main__"):  # runs the command
        continue
    try:
        for name in getattr(importlib.import_module(module.name), "__all__", ()):
            assert hasattr(sys.modules[module.name], name), (module.name, name)
    except ModuleNotFoundError as error:
        print("module", module.name, "needs", error.name)
for name in main.commands:
    shown = click.testing.CliRunner().invoke(main, [name, "--help"])
    assert shown.exit_code == 0 and "Usage" in shown.output, (name, shown.output)

classifier, encoder = "resnet10_cifar.pseudo_label_at_c10_slf", "resnet10_cifar.pseudo_label_at_c10"
images, labels = load_data("fake:40"), torch.zeros(40, 1, dtype=torch.int64)
pathlib.Path("train.parquet").touch()
quick = advcl_hub.Protocol(steps=1, check_images=0)
pulled = "pulled"


def ends(call):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
        return "works"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


CALLS = {
    "create_model": lambda: timm.create_model(classifier, pretrained=True),
    "releases": lambda: advcl_hub.releases()[encoder],
    "verify": lambda: advcl_hub.verify(classifier),
    "pull": lambda: advcl_hub.pull(classifier, pulled),
    "register": lambda: advcl_hub.register("resnet10_cifar.own", pulled),
    "evaluate": lambda: advcl_hub.evaluate(classifier, images, quick, output="e", progress=False),
    "report": lambda: report([load_record("e")]),
    "add_to_results": lambda: add_to_results(pulled, ["e"], ["A note."], "mit"),
    "write_card": lambda: write_card(pulled),
    "push": lambda: advcl_hub.push(pulled, "org/name", dry_run=True),
    "robustness": lambda: robustness(timm.create_model(classifier, pretrained=True), images, steps=1),
    "adversarial_images": lambda: adversarial_images(timm.create_model(classifier, pretrained=True), images, quick),
    "AdvCL": lambda: AdvCL(timm.create_model("resnet8_cifar", num_classes=0), ks=(2,))(images.images[:8], labels[:8]),
    "digits": lambda: load_data("digits"),
    "parquet": lambda: load_data("parquet:."),
    "pseudo-labels": lambda: make_pseudo_labels(images, "pixels", ks=(2,)),
    "autoattack": lambda: advcl_hub.evaluate(classifier, images, advcl_hub.Protocol(autoattack="standard")),
    "finetune": lambda: advcl_hub.finetune(encoder, images, output="run"),
    "transfer": lambda: advcl_hub.transfer([encoder], ["fake:40"]),
    "convert": lambda: advcl_hub.convert("train.parquet", "converted"),
}
for name, call in CALLS.items():
    print(name, ends(call))
"""
# The packages of the extras, by the names under which they are imported.
OF_EXTRAS = {"scikit-learn": "sklearn"} | {
    name: name for name in ("accelerate", "matplotlib", "pyarrow", "pyautoattack", "tensorboard", "threadpoolctl")
}


@pytest.mark.slow
def test_installed_without_extras_everything_works_or_names_its_extra(wheel: Path, tmp_path: Path) -> None:
    """The wheel without the checkout, and without the packages of the extras."""
    extras = {e: {Requirement(r).name for r in rs} for e, rs in PROJECT["optional-dependencies"].items() if e != "dev"}
    assert set().union(*extras.values()) == set(OF_EXTRAS)
    site, here = tmp_path / "site", tmp_path / "here"
    zipfile.ZipFile(wheel).extractall(site)
    here.mkdir()
    hidden = f"sys.modules.update(dict.fromkeys({sorted(OF_EXTRAS.values())}))"  # None: as if it were not installed
    path = f"sys.path[:] = [sys.argv[1], *(p for p in sys.path if p != {str(ROOT)!r})]"
    (here / "program.py").write_text(f"import sys\n{hidden}\n{path}\n{INSTALLED}", encoding="utf-8")
    command = [sys.executable, "program.py", str(site)]
    done = subprocess.run(command, cwd=here, env=environment(OMP_NUM_THREADS="1"), capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    lacking = {line.split()[1]: line.split()[3].partition(".")[0] for line in lines if line.startswith("module ")}
    # What imports a package of an extra at once is only imported where that is known to be there.
    assert lacking == {
        "advcl_hub.evaluation.pictures": "matplotlib",
        "advcl_hub.finetuning.trainer": "accelerate",
        "advcl_hub.training.ambient": "accelerate",
        "advcl_hub.training.loop": "accelerate",
        "advcl_hub.training.pictures": "matplotlib",
        "advcl_hub.training.runlog": "accelerate",
    }
    ends = dict(line.split(" ", 1) for line in lines if not line.startswith("module "))
    named = {"digits": "data", "parquet": "data", "pseudo-labels": "pretrain", "autoattack": "eval", "finetune": "finetune"}
    for name, extra in (named | {"transfer": "finetune"}).items():
        assert ends.pop(name).endswith(f'pip install "advcl-hub[{extra}]"'), done.stdout
    assert "train.parquet" in ends.pop("convert")
    assert set(ends.values()) == {"works"}, done.stdout


# --------------------------------------------------------------------------------- make on a fresh machine

# A real interpreter that tells one lie about itself.
LIAR = """#!{python}
import runpy, sys
{lie}
sys.argv.pop(0)
if sys.argv[0] == "-c":
    exec(sys.argv[1])
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
TOO_OLD = "sys.version_info = (3, 8, 10)"
NO_ENSUREPIP = "sys.modules['ensurepip'] = None"

# Stands for the real package, which takes minutes to install: no dependencies, its own build backend.
SMALL_PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
SMALL_BACKEND = """
import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    with zipfile.ZipFile(f"{folder}/small-1-py3-none-any.whl", "w") as wheel:
        info = "small-1.dist-info/"
        metadata = "Metadata-Version: 2.1\\nName: small\\nVersion: 1\\nProvides-Extra: dev\\n"
        wheel.writestr(info + "METADATA", metadata)
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return "small-1-py3-none-any.whl"
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def environment(**variables: str) -> dict[str, str]:
    """The environment without pip's and make's settings, so that an outer `make test` does not leak in."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "MAKE", "MFLAGS"))}
    for name in ("VENV", "PYTHON", "PYTHONPATH", "NEED_GB", "PYTEST_ARGS"):
        inherited.pop(name, None)
    return inherited | {"PIP_CONFIG_FILE": os.devnull} | variables


def bootstrap(venv: Path, *arguments: str, need_gb: str = "0.1", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ".ci/bootstrap.py", "--venv", str(venv), "--stamp", str(venv / "stamp")]
    command += ["--need-gb", need_gb, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, encoding="utf-8")


def make(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("make") or "make", "NEED_GB=0.1", *arguments]
    return subprocess.run(command, cwd=project, env=environment(**variables), capture_output=True, text=True, encoding="utf-8")


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """Returns the one sentence that a refused set-up says."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
    assert result.returncode != 0
    assert len(lines) == 1 and lines[0].startswith("setup: "), result.stderr
    return lines[0]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project with this repository's Makefile and bootstrap script."""
    folder = tmp_path / "project"
    (folder / "train").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    (folder / "pyproject.toml").write_text(SMALL_PYPROJECT, encoding="utf-8")
    (folder / "backend.py").write_text(SMALL_BACKEND, encoding="utf-8")
    (folder / "train" / "demo.py").write_text("import sys\nprint('demo ran in', sys.prefix, sys.argv[1:])\n", encoding="utf-8")
    return folder


def test_bootstrap_can_be_read_by_an_old_python() -> None:
    ast.parse((ROOT / ".ci/bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, 6))


@pytest.mark.slow
def test_make_sets_up_once_and_again_when_the_dependencies_change(project: Path) -> None:
    left_by_a_killed_run = project / ".venv"
    left_by_a_killed_run.mkdir()
    (left_by_a_killed_run / ".advcl-hub-unfinished").touch()
    (left_by_a_killed_run / "bin").write_text("in the way of a new environment", encoding="utf-8")

    first = make(project, "demo")
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"demo ran in {project / '.venv'} ['--output', 'runs/demo']" in first.stdout
    assert "setup: ready" in first.stdout
    assert not {".advcl-hub-unfinished", ".pip-tmp"} & set(os.listdir(project / ".venv"))

    second = make(project, "demo")
    assert second.returncode == 0 and "demo ran" in second.stdout
    assert "setup:" not in second.stdout

    later = time.time() + 60
    os.utime(project / "pyproject.toml", (later, later))
    third = make(project, "demo")
    assert "setup: installing" in third.stdout and "setup: making" not in third.stdout


def test_make_refuses_a_python_that_is_too_old(project: Path) -> None:
    old = write_script(project / "bin" / "python3", LIAR.format(python=sys.executable, lie=TOO_OLD))
    sentence = refusal(make(project, "demo", PATH=str(old.parent)))
    assert "Python 3.11 or newer" in sentence and "Python 3.8.10" in sentence
    assert not (project / ".venv").exists()


def test_make_refuses_a_machine_without_python(project: Path) -> None:
    assert "no Python found" in refusal(make(project, "demo", PATH=str(project / "empty")))


def test_bootstrap_refuses_a_python_without_ensurepip(tmp_path: Path) -> None:
    lame = write_script(tmp_path / "bin" / "lame", LIAR.format(python=sys.executable, lie=NO_ENSUREPIP))
    sentence = refusal(bootstrap(tmp_path / "venv", "--python", str(lame), PATH=str(tmp_path)))
    assert "cannot make virtual environments" in sentence
    assert f"python3.{sys.version_info.minor}-venv" in sentence
    assert not (tmp_path / "venv").exists()


def test_bootstrap_refuses_a_full_disk(tmp_path: Path) -> None:
    sentence = refusal(bootstrap(tmp_path / "some" / "venv", need_gb="1000000000"))
    assert "1e+09 GB of disk" in sentence and str(tmp_path) in sentence
    assert not (tmp_path / "some").exists()


def test_bootstrap_leaves_a_folder_that_is_no_environment_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert "not a working virtual environment" in refusal(bootstrap(tmp_path))
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "years of work"


@pytest.mark.slow
def test_bootstrap_without_network_takes_a_newer_python_and_leaves_only_a_log(tmp_path: Path) -> None:
    old = write_script(tmp_path / "bin" / "old", LIAR.format(python=sys.executable, lie=TOO_OLD))
    write_script(tmp_path / "bin" / "python3.12", LIAR.format(python=sys.executable, lie=""))
    index = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1", "NO_PROXY": "127.0.0.1"}
    result = bootstrap(tmp_path / "venv", "--python", str(old), PATH=str(old.parent), **index)
    sentence = refusal(result)
    assert "setup: making" in result.stdout
    assert "package index could not be reached" in sentence and "venv-install.log" in sentence
    assert sorted(os.listdir(tmp_path)) == ["bin", "venv-install.log"]


@pytest.mark.slow
def test_bootstrap_interrupted_while_pip_works_leaves_no_environment(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_index:
        command = [sys.executable, ".ci/bootstrap.py", "--venv", str(tmp_path / "venv"), "--stamp", "unused"]
        variables = environment(PIP_INDEX_URL=f"http://127.0.0.1:{silent_index.getsockname()[1]}/simple", NO_PROXY="127.0.0.1")
        with subprocess.Popen(
            [*command, "--need-gb", "0.1"],
            cwd=ROOT,
            env=variables,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts background jobs with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            encoding="utf-8",
        ) as process:
            silent_index.settimeout(60)
            silent_index.accept()  # pip has asked, and will wait for the answer
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert errors.splitlines() == ["setup: interrupted; nothing is left behind, try again when you like"]
    assert not (tmp_path / "venv").exists()
