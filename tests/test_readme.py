"""What the README tells a newcomer to type works as it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.hub_server import Hub
from tests.support.image_files import encode, pixels, write


def blocks(section: str) -> list[tuple[str, str]]:
    """(language, text) of the code in a section of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_finetuning_on_own_images_and_sharing_what_came_out(tmp_path: Path) -> None:
    (shell, typed), (python, program), *_ = blocks("Finetune it")
    assert (shell, python) == ("sh", "python") and "pets" in typed and "pets" in program
    for split, count in {"train": 12, "test": 8}.items():
        for name in ("cat", "dog"):
            for number in range(count):  # photographs of several sizes
                write(tmp_path / "pets" / split / name / f"{number}.jpg", encode(pixels(40 + number, 30), "JPEG"))
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    command = shutil.which("advcl-hub", path=str(Path(sys.executable).parent))
    assert command, "the package is installed in the environment of the tests"
    environment = os.environ | {"PATH": f"{Path(command).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(typed: str) -> str:
        done = subprocess.run(
            ["bash", "-c", f"set -e\n{typed}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run(typed)
    standard, robust = map(float, run(f"{sys.executable} program.py").split()[-2:])
    assert 0 <= robust <= standard <= 1
    assert (tmp_path / "runs/pets/classifier/model.safetensors").is_file()
    assert (tmp_path / "evaluations/pets-classifier").is_dir()

    (_, typed), (_, program), *_ = blocks("Share it")
    (tmp_path / "program.py").write_text(f"{program}\nprint(model.num_classes)\n", encoding="utf-8")
    with Hub({"hf_alice": ("alice", ["ORG"])}).serve() as hub:
        environment |= hub.environment(tmp_path / "home", "hf_alice")
        environment["PATH"] = f"{Path(command).parent}:{environment['PATH']}"
        assert "has (commit" in run(typed) and hub.repos["ORG/resnet10_cifar.pets"].private
        assert run(f"{sys.executable} program.py").split()[-1] == "2"
