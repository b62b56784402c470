"""What lies around in the environment and in the process changes no training, and training leaves it as it was."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState
from safetensors.torch import load_file
from torch import Tensor

import advcl_hub
from advcl_hub import files
from advcl_hub.records.environment import backends, hardware
from advcl_hub.training import lock
from advcl_hub.training.lock import FILE as LOCK
from advcl_hub.training.lock import RunLock
from advcl_hub.training.loop import open_accelerator
from advcl_hub.training.stop import StopRequest
from tests.support import warm
from tests.support.small_encoders import SMALL_RESNET, export_encoder
from train.checkpoint import load_checkpoint
from train.pretrain import Trainer, pretrain
from train.recipe import Recipe, load_recipe

# Each would change the result, or stop the work, if accelerate saw it.
PINNED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "aot_eager",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_FP8_BACKEND": "TE",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    "ACCELERATE_DOWNCAST_BF16": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "0.01",
    "ACCELERATE_USE_SAGEMAKER": "true",
    "ACCELERATE_A_NEW_ONE": "1",
}
ENGINES = [f"ACCELERATE_USE_{name}" for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_encoder(tmp_path_factory.mktemp("encoders") / "resnet", **SMALL_RESNET)


def tuned(encoder: Path, output: Path) -> dict[str, Tensor]:
    """Weights after five steps."""
    settings = {"epochs": 1, "batch_size": 8, "lr": 0.1}
    made = advcl_hub.finetune(encoder, "fake:40", "sff", output=output, **settings)
    return load_file(made.folder / "model.safetensors")


@pytest.fixture(scope="module")
def usual(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return tuned(encoder, tmp_path_factory.mktemp("usual") / "run")


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("name", PINNED)
def test_a_variable_of_accelerate_changes_no_finetuning(
    encoder: Path, usual: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, PINNED[name])
    before = dict(os.environ)
    assert differing(usual, tuned(encoder, tmp_path / "run")) == []
    assert dict(os.environ) == before


def test_an_earlier_accelerator_changes_no_finetuning_and_is_left_alone(
    encoder: Path, usual: dict[str, Tensor], tmp_path: Path
) -> None:
    earlier = Accelerator(cpu=True, mixed_precision="fp16", gradient_accumulation_steps=4)
    earlier.gradient_state._set_sync_gradients(False)  # in the middle of an accumulation: steps are no steps
    assert differing(usual, tuned(encoder, tmp_path / "run")) == []
    assert earlier.mixed_precision == "fp16" and earlier.gradient_accumulation_steps == 4 and not earlier.sync_gradients
    assert Accelerator(mixed_precision="fp16").mixed_precision == "fp16"


def test_runs_of_different_precision_follow_each_other() -> None:
    first, second = (open_accelerator(cpu=True, mixed_precision=precision) for precision in ("bf16", "no"))
    assert (first.mixed_precision, second.mixed_precision) == ("bf16", "no")
    later = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    assert later.gradient_accumulation_steps == 2 and second.gradient_accumulation_steps == 1


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    tiny = [
        *("data.source=fake:60", "data.size=16", "batch_size=16", "epochs=1", "optimizer.warmup_epochs=0", "attack.steps=1"),
        *("pseudo_labels.ks=[3]", "judge.every=0", "model_kwargs.channels=[16,16,16]", "speed.mixed_precision=no"),
    ]
    return lambda *settings: load_recipe("digits_demo", [*tiny, f"pseudo_labels.cache={tmp_path / 'labels'}", *settings])


def test_variables_of_accelerate_change_no_pretraining(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretrain(recipe(), tmp_path / "usual", StopRequest())
    for name, value in PINNED.items():
        monkeypatch.setenv(name, value)
    assert pretrain(recipe(), tmp_path / "other", StopRequest())
    assert open_accelerator(cpu=True).state.dynamo_plugin.backend.value == "NO"
    one, other = (load_checkpoint(tmp_path / name) for name in ("usual", "other"))
    assert differing(dict(one.tensors), dict(other.tensors)) == []
    assert one.provenance["hardware"]["backends"] == backends(torch.device("cpu"))


@pytest.mark.parametrize("name", ENGINES)
def test_another_engine_is_refused_before_any_work(
    encoder: Path, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "true")
    message = f"^{name} is true, but .* is not supported here: unset the variable"
    with pytest.raises(ValueError, match=message):
        tuned(encoder, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        Trainer(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(name, "false")
    assert open_accelerator(cpu=True).num_processes == 1


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM])
def test_an_earlier_accelerator_of_another_engine_is_refused(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Accelerator(cpu=True).num_processes == 1
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    message = f"^An Accelerator of this process trains with {kind.value}, which is not supported here: start a new process"
    with pytest.raises(ValueError, match=message):
        open_accelerator(cpu=True)


def test_more_processes_than_accelerate_sees_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would train alone, and all of them in one folder."""
    assert Accelerator(cpu=True).num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^2 processes were launched, but accelerate sees 1\.$"):
        open_accelerator(cpu=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_earlier_accelerator_that_computed_elsewhere(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """Its device does not bind a process that is alone, but those that were joined to compute there."""
    assert Accelerator(cpu=True).num_processes == 1
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    monkeypatch.setitem(PartialState._shared_state, "num_processes", processes)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if processes == 1:
        assert open_accelerator(cpu=True).device == torch.device("cpu")
        assert PartialState().device == torch.device("meta"), "others keep theirs"
        return
    with pytest.raises(ValueError, match=r"^These processes were joined to compute on meta: start new ones\.$"):
        open_accelerator(cpu=True)


# ------------------------------------------------------------------------------------------------------------- the record


def test_the_hardware_names_what_the_environment_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    found = hardware(cpu, 1)
    assert {"device", "name", "threads", "processes"} < set(found)
    assert found["backends"]["cudnn_benchmark"] and not found["backends"]["deterministic"]
    assert found["backends"]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert found["backends"]["float32_matmul"] == "ieee" == backends(gpu)["float32_matmul"]
    earlier = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert backends(gpu)["float32_matmul"] == "tf32" and backends(cpu)["float32_matmul"] == "bf16"
    finally:
        torch.set_float32_matmul_precision(earlier)


def test_an_evaluation_records_what_it_pins(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    folder = export_encoder(encoder.parent / "classifier", num_classes=10, **SMALL_RESNET)
    config = advcl_hub.Protocol(steps=1, check_images=0)
    told = advcl_hub.evaluate(folder, "fake:20", config, progress=False).record["hardware"]
    assert not told["backends"]["cudnn_benchmark"] and told["backends"]["cudnn_deterministic"]
    assert torch.backends.cudnn.benchmark


# --------------------------------------------------------------------------------------------------- one run in one folder


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[warm.Warm]:
    """Another process that trains in tmp_path / "run", as far as the lock can tell."""
    code = (
        "import sys, time; from pathlib import Path; from advcl_hub.training.lock import RunLock; "
        "RunLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    )
    with warm.start("-c", code, tmp_path / "run") as process:
        process.wait_for("locked\n")
        yield process


def test_a_folder_where_another_process_trains_is_refused_until_that_is_gone(
    encoder: Path,
    usual: dict[str, Tensor],
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    other_process: warm.Warm,
) -> None:
    refused = f"^Another process trains in {tmp_path / 'run'}: wait for it, or choose another output"
    with pytest.raises(ValueError, match=refused):
        tuned(encoder, tmp_path / "run")
    with pytest.raises(ValueError, match=refused):
        pretrain(recipe(), tmp_path / "run", StopRequest())
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    other_process.kill()
    other_process.wait()
    assert differing(usual, tuned(encoder, tmp_path / "run")) == []
    assert not (tmp_path / "run" / LOCK).exists()


def test_two_runs_that_begin_at_the_same_time_are_told_apart(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Before there is a folder there is no lock: what is prepared and never run leaves no trace."""
    late = Trainer(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert pretrain(recipe(), tmp_path / "run", StopRequest())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"Another process began to train in .* at the same time: repeat the command"):
        late.run(StopRequest())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_lock_lasts_from_before_the_checkpoint_to_the_end_of_the_run(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, seen = tmp_path / "run", list[bool]()
    output.mkdir()
    for name in ("load_training_data", "load_checkpoint", "export_checkpoint"):
        whole = getattr(sys.modules["train.pretrain"], name)

        def spy(*arguments: object, whole: Callable[..., object] = whole, **options: object) -> object:
            seen.append((output / LOCK).exists())
            return whole(*arguments, **options)

        monkeypatch.setattr("train.pretrain." + name, spy)
    assert pretrain(recipe(), output, StopRequest())
    assert seen == [True] * 3 and not (output / LOCK).exists()
    with RunLock(output).folder.joinpath(LOCK).open(encoding="utf-8"):  # a finished run answers at once all the same
        assert pretrain(recipe(), output, StopRequest())
    RunLock(output).release()


def test_a_lock_file_that_is_removed_before_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True])
    monkeypatch.setattr("advcl_hub.training.lock._is_at", lambda *_: next(answers))
    lock = RunLock(tmp_path / "run")
    assert next(answers, None) is None and (tmp_path / "run" / LOCK).exists()
    lock.release()


def test_a_lock_file_that_another_run_takes_away_when_it_ends_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking: the lock of a file that is gone would keep nobody out."""
    path, taken = tmp_path / "run" / LOCK, list[bool]()

    def late(file: TextIO) -> bool:
        if not taken:
            path.unlink()
        taken.append(files.lock(file))
        return taken[-1]

    monkeypatch.setattr(lock, "lock", late)
    held = RunLock(tmp_path / "run")
    assert taken == [True, True] and path.exists()
    held.release()
    assert not path.exists()


def test_the_end_of_the_process_takes_away_the_locks_of_runs_that_were_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_held", {})
    for name in ("one", "two"):
        RunLock(tmp_path / name)
    (tmp_path / "one" / LOCK).unlink()  # by whoever cleaned up
    lock._remove_all()
    assert not list(tmp_path.rglob(LOCK)) and all(file.closed for file in lock._held.values())


def test_a_file_system_whose_files_have_no_numbers_does_without_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advcl_hub.training.lock._is_at", lambda *_: False)
    with pytest.warns(UserWarning, match="cannot be locked: do not start the same work twice"):
        RunLock(tmp_path / "run").release()


def test_a_second_lock_of_the_same_process_is_the_same_lock(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run")
    RunLock(tmp_path / "run")  # a run of this process that was given up hands it on
    first.release()
    assert not (tmp_path / "run" / LOCK).exists()
