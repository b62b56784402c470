"""A folder that timm opens: config.json, model.safetensors, results.json, and a golden input/output pair to check any copy.

timm.create_model("local-dir:FOLDER", pretrained=True)     # after `import advcl_hub`

The projection head of pretraining may lie beside the encoder (projector.safetensors, see `advcl_hub.hub.projector`).
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from advcl_hub.errors import reason_of
from advcl_hub.files import file_sha256, make_readable, parse_json, refuse_pointer, without_local_paths, write_errors
from advcl_hub.hub.projector_file import PROJECTOR, layers_of, projector_from_state, read_projector, save_projector, widths_of
from advcl_hub.modes import as_usual
from advcl_hub.private import config_writer
from advcl_hub.training.tensors import separate

WEIGHTS = "model.safetensors"
GOLDEN = "golden.safetensors"
RESULTS = "results.json"
CONFIG = "config.json"
CARD = "README.md"
PICTURE = "examples.png"
CHECKED = (CONFIG, GOLDEN, WEIGHTS)  # whose sha256 results.json tells; that of PROJECTOR, too, if there is one
EXTRAS = (CARD, PICTURE)  # what an export may have besides
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@as_usual()
def export_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    results: Mapping[str, Any],
    model_args: Mapping[str, Any] | None = None,
    label_names: Sequence[str] = (),
    dtype: str = "float32",
    projector: nn.Sequential | None = None,
) -> Path:
    """Writes a plain timm model (one batch-norm branch, already chosen) to a folder, which appears complete or not at all.

    Args:
        model: a timm model; its `pretrained_cfg` (input size, mean, std) is what it was trained with.
        folder: where to; an earlier export there is replaced.
        results: provenance and figures, written to results.json with the sha256 of all other files added. Of absolute paths the
            last part stays (`advcl_hub.files.without_local_paths`): the folder is made to be published.
        model_args: arguments of `timm.create_model` that the architecture needs, e.g. `img_size`.
        label_names: class names of a classifier.
        dtype: of the stored weights, `float32` or `float16`; timm loads either into float32. Running averages of batch norms
            are float32 in both.
        projector: the projection head that the encoder was pretrained with, of Linear, BatchNorm1d (or SyncBatchNorm) and ReLU
            layers; its input is as wide as the model's pooled features. results.json tells its layers and widths (`projector`).

    Returns:
        The folder.

    Raises:
        ValueError: no timm model, an unknown dtype, weights that are not finite in it, a projection head of other layers or of
            another width or with a classifier, or a folder that holds anything but an earlier export.
        OSError: the folder cannot be written (a full disk); nothing is left behind.
        ImportError: this version of timm is not as we know it; see `advcl_hub.private.config_writer`.
    """
    folder = Path(folder)
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"{type(model).__name__} is no timm model (no pretrained_cfg): of a wrapper, export the model in it.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    head = None if projector is None else _head(model, projector)
    save_config = config_writer()  # before anything is written
    with replacing_folder(folder) as draft:
        state = _stored(separate(model.state_dict()), DTYPES[dtype])
        save_file(state, draft / WEIGHTS, metadata={"format": "pt"})
        save_config(
            model,
            draft / CONFIG,  # timm declares str, but before 1.0.31 it calls .open() on it
            model_config={"label_names": list(label_names)} if label_names else {},
            model_args={k: v for k, v in (model_args or {}).items() if v is not None},
        )
        exported = load_folder(draft)
        _correct_pool_size(exported, draft / CONFIG)
        _save_golden(exported, draft / GOLDEN)
        record, files = without_local_paths(results), list(CHECKED)
        if projector is not None:
            tensors = _stored(separate(projector.state_dict()), DTYPES[dtype])
            save_projector(tensors, layers_of(projector), draft / PROJECTOR)
            record["projector"] = head
            files.append(PROJECTOR)
        record |= {"dtype": dtype, "sha256": {name: file_sha256(draft / name) for name in files}}
        (draft / RESULTS).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def check_exportable() -> None:
    """Raises ImportError unless `export_folder` can write what this version of timm opens: asked before long work."""
    config_writer()


def export_again(source: str | Path, folder: str | Path, *, dtype: str) -> Path:
    """Writes an export again with its weights in another dtype, and verifies it.

    Evaluations, their picture and the card stay behind: they are of the weights as they were.

    Args:
        source: an exported folder, which is verified.
        folder, dtype: see `export_folder`.

    Raises:
        ValueError, OSError: see `verify_folder` and `export_folder`.
    """
    source = Path(source)
    if source.resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents):
        raise ValueError(f"{folder} would replace {source}, or lie inside it: choose another folder.")
    verify_folder(source)
    results, config = (json.loads((source / name).read_text(encoding="utf-8")) for name in (RESULTS, CONFIG))
    earlier = {"dtype": results.get("dtype"), "sha256": results["sha256"][WEIGHTS]}
    kept = {key: value for key, value in results.items() if key not in ("dtype", "sha256", "evaluations", "other_seeds")}
    projector = read_projector(source / PROJECTOR) if PROJECTOR in results["sha256"] else None
    again = export_folder(
        load_folder(source),
        folder,
        results=kept | {"rounded_from": earlier},
        model_args={key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"},
        label_names=config.get("label_names") or (),
        dtype=dtype,
        projector=projector,
    )
    verify_folder(again)
    return again


@as_usual()
def load_folder(folder: str | Path) -> nn.Module:
    """`timm.create_model("local-dir:FOLDER", pretrained=True)` in evaluation mode; ValueError for a Git LFS pointer."""
    refuse_pointer(Path(folder) / WEIGHTS)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@as_usual()
def verify_folder(folder: str | Path) -> float:
    """Checks an export after any copy: the sha256 of its files, and the golden output through timm.

    Returns:
        The largest absolute difference from the golden output, relative to its largest absolute value.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not the one that was exported, the architecture is not known here, or the output differs by more
            than 1e-3.
    """
    folder = Path(folder)
    _check_complete(folder, (RESULTS, *CHECKED))
    recorded = recorded_sha256(folder / RESULTS)
    _check_complete(folder, recorded)
    for name, expected in recorded.items():
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} is not the file that was exported (its sha256 differs): copy it again.")
    try:
        golden = load_file(folder / GOLDEN)
        model = load_folder(folder)
        with torch.no_grad():
            output = model(golden["input"])
        difference = (output - golden["output"]).abs().max().item()
        if scale := golden["output"].abs().max().item():  # it may be zero: a head that was not trained yet
            difference /= scale
    except (OSError, ImportError):
        raise
    except Exception as error:  # timm, torch and safetensors share no base class
        raise ValueError(f"{folder} cannot be opened by timm: {reason_of(error)}") from error
    if not difference < 1e-3:  # float32 on another device or library stays far below
        raise ValueError(f"{folder} computes something else than when it was exported (relative difference {difference:.1e}).")
    return difference


def _check_complete(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: not a complete export.")
        refuse_pointer(folder / name)


def recorded_sha256(path: Path) -> dict[str, str]:
    """By name the sha256 of an export's files, from its results.json. Raises ValueError if that is damaged."""
    try:
        recorded = parse_json(path.read_text(encoding="utf-8"))["sha256"]
        return {name: recorded[name] for name in (*CHECKED, *((PROJECTOR,) if PROJECTOR in recorded else ()))}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): copy it again.") from None


def check_replaceable(folder: Path) -> None:
    """Raises ValueError if anything but an earlier export would be lost by replacing the folder."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    foreign = names - {RESULTS, *CHECKED, PROJECTOR, *EXTRAS}
    if foreign or (names and RESULTS not in names):
        raise ValueError(f"{folder} exists and is not an earlier export: choose another folder.")


def _stored(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in another type. Running averages stay as they are: few, and a variance may exceed float16's 65,504."""
    stored = {}
    for name, tensor in state.items():
        kept = name.endswith(("running_mean", "running_var")) or not tensor.is_floating_point()
        stored[name] = tensor.detach().cpu().to(tensor.dtype if kept else dtype)
    if not all(tensor.isfinite().all() for tensor in stored.values()):
        raise ValueError(f"Some weights are not finite as {str(dtype).removeprefix('torch.')}: export them as float32.")
    return stored


def _head(model: nn.Module, projector: nn.Sequential) -> dict[str, Any]:
    """What results.json says of a projection head; ValueError if it cannot be exported with this model."""
    layers = layers_of(projector)
    widths = widths_of(projector_from_state(projector.state_dict(), layers))
    if getattr(model, "num_classes", 0):
        raise ValueError("The model is a classifier: a projection head is exported with the encoder that it was trained with.")
    features = cast(int, getattr(model, "head_hidden_size", None) or model.num_features)
    if widths[0] != features:
        raise ValueError(f"The projection head takes {widths[0]} features, but the encoder gives {features}.")
    return {"layers": layers, "widths": widths}


def _correct_pool_size(model: nn.Module, path: Path) -> None:
    """timm's cfg has the size of the last feature map for images of the architecture's usual size; ours may have others."""
    config = json.loads(path.read_text(encoding="utf-8"))
    cfg = config["pretrained_cfg"]
    if cfg.get("pool_size"):
        with torch.no_grad():
            features = model.forward_features(torch.zeros(1, *cfg["input_size"]))  # type: ignore[operator]
        if features.ndim == 4 and str(getattr(model, "output_fmt", "NCHW")) == "NCHW":
            cfg["pool_size"] = list(features.shape[-2:])
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save_golden(model: nn.Module, path: Path) -> None:
    """A seeded input and what the exported weights make of it."""
    cfg = cast(dict[str, Any], model.pretrained_cfg)
    images = torch.rand(2, *cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        save_file({"input": images, "output": model(images).contiguous()}, path)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Fills a folder beside its place and renames it over the earlier export.

    Yields:
        The folder to write to in the `with` block. If the block fails it is removed, and the earlier one stays.

    Raises:
        ValueError: the folder holds anything but an earlier export.
        OSError: it cannot be written, because the disk is full or for other reasons.
    """
    folder = folder.resolve()  # of a link, what it points to
    if folder == Path.cwd():
        raise ValueError("The current folder cannot be replaced: name another.")
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        write_errors(folder),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temporary,
    ):
        draft = Path(temporary)
        yield draft
        for path in draft.iterdir():
            make_readable(path)
        make_readable(draft, 0o777)
        _replace_folder(draft, folder)


def _replace_folder(draft: Path, folder: Path) -> None:
    """Puts `draft` in the place of `folder`; the earlier folder goes only when the new one stands."""
    earlier = draft.with_name(f"{draft.name}-earlier")
    if folder.exists():
        folder.rename(earlier)
    try:
        draft.rename(folder)
    except BaseException:
        if earlier.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
