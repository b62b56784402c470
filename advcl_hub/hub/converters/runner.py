"""From a published checkpoint file to a folder that timm opens: `advcl_hub.hub.converters.convert`."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from advcl_hub.files import check_writable
from advcl_hub.hub.converters.checkpoint import Checkpoint, read_checkpoint
from advcl_hub.hub.converters.layouts import LAYOUTS, Layout, Outline, detect_layout, outline, place, projection_head
from advcl_hub.hub.converters.reference import published_features
from advcl_hub.hub.export import DTYPES, check_replaceable, export_folder
from advcl_hub.records.environment import versions

_IMAGES, _SEED, _TOLERANCE = 4, 0, 1e-9  # of the output check, which computes in float64
_PUBLISHED = {"clean": "normal", "adv": "pgd", "adv_ce": "pgd_ce"}


@dataclass(frozen=True)
class Normalisation:
    """What the network subtracts from images in [0, 1] and divides them by, one number a channel.

    Attributes:
        mean, std: the numbers.
        origin: where they are from, for people to read.
        in_file: whether they are the file's own buffers (see `Layout.normalize`).
    """

    mean: list[float]
    std: list[float]
    origin: str
    in_file: bool = False


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        folder: for `timm.create_model("local-dir:FOLDER", pretrained=True)`.
        layout: which published layout the file has.
        branch: the batch-norm branch that was taken, None for a network with one batch norm.
        record: its results.json, but for the sha256 of its files.
        hints: what the file cannot tell, and whoever knows where it is from should think of.
    """

    folder: Path
    layout: str
    branch: str | None
    record: dict[str, Any]
    hints: tuple[str, ...] = ()

    def describe(self) -> str:
        """What was made of the file, for people to read."""
        record, norm = self.record, self.record["normalisation"]
        entry = f", entry {record['entry']}" if record["entry"] else ""
        outputs = f"{record['outputs']} {'classes' if record['kind'] == 'classifier' else 'features'}"
        branch = f", batch-norm branch {self.branch}" if self.branch else ""
        lines = [
            f"{record['file']}{entry}: layout {self.layout}{branch}",
            f"{self.folder}: {record['architecture']}, {record['kind']} with {outputs}",
            f"images: mean {_short(norm['mean'])}, std {_short(norm['std'])} ({norm['from']})",
        ]
        lines += [f"left out: {len(keys)} keys, {reason}" for reason, keys in record["dropped"].items()]
        if record["other_entries"]:
            lines.append(f"not read: {', '.join(record['other_entries'])}")
        lines += [f"note: {note}" for note in (*record["notes"], *self.hints)]
        check = record["output_check"]
        lines.append(
            f"outputs: those of the published network, computed from its own keys, to {check['largest_difference']:.1e} of the "
            f"largest ({check['images']} images, float64)"
        )
        return "\n".join(lines)


def convert(
    file: str | Path,
    folder: str | Path,
    layout: str = "auto",
    *,
    entry: str | None = None,
    architecture: str | None = None,
    branch: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    size: int | None = None,
    keep_head: bool | None = None,
    keep_projector: bool = False,
    label_names: Sequence[str] = (),
    dtype: str = "float32",
    origin: str | None = None,
) -> Conversion:
    """Converts a checkpoint of a published code to a folder that timm opens.

        convert("epoch_1000.ckpt", "exports/advcl", origin="github.com/LijieFan/AdvCL, CIFAR-10")

    Every key of the file is used, or left out for a reason that results.json tells; otherwise nothing is written. Before that,
    the model's outputs are compared with those of the published network, computed from the published keys.

    Layouts (see layouts.py): `advcl` (AdvCL, arXiv 2111.01124), `acl` (ACL, arXiv 2010.13337; DynACL, arXiv
    2303.01289, of whose two copies the averaged one is taken; DynACL-AIR, arXiv 2305.00374), `kuangliu` (the CIFAR ResNets of
    kuangliu/pytorch-cifar) and `solo` (the CIFAR ResNets of solo-learn, whose stems pad images by 2 pixels, and of the codes
    that follow it: DeACL, arXiv 2207.10899, and ProFeAT, arXiv 2406.05796); before and after finetuning. ResNet-18, 34 and 50,
    in the widths that the file has.

    Normalisation of the images goes into the config, from which timm's transforms and `evaluate` take it. AdvCL has none (mean
    0, std 1). ACL's, DynACL's, DeACL's and ProFeAT's networks normalise inside, by a mean and std that their files hold
    (`normalize.mean`, `normalize.std`). Other files say nothing about it: the caller has to. It is not folded into the first
    convolution. That would not be exact: the convolution pads the normalised image with zeros, i.e. with the mean colour, and a
    folded one would pad with black.

    Args:
        file: written by torch.save or safetensors. It is never unpickled.
        folder: where to; an earlier export there is replaced.
        layout: one of `advcl`, `acl`, `kuangliu`, `solo`, or `auto` to read it off the keys.
        entry: which entry of the file, where several hold a network (`model` and `ema`); or the other copy of a network:
            DynACL's `encoder_q`; `momentum_backbone`, DeACL's clean teacher and solo-learn's averaged network.
        architecture: the timm model that it has to be, by default the one that fits.
        branch: whose batch norms to take, `clean`, `adv` or `adv_ce` (published as normal, pgd, pgd_ce); by default `adv`,
            which finetuning starts from, and the only one of a file with one.
        mean, std: what the network subtracts from images in [0, 1] and divides them by, one number or one a channel. Given,
            they replace the file's buffers: RobustSSL_Benchmark saves those also where its network does not use them (AdvCL,
            DeACL).
        size: side of the images, in pixels; by default 32, or 96 for the 7x7 stem of ACL's networks for STL-10.
        keep_head: whether a linear head makes it a classifier; by default it does, unless `keep_projector`. DynACL++ saves the
            head that it fits to pseudo-labels: leave that out. solo-learn and DeACL save the one that they fit to the labels
            while they pretrain.
        keep_projector: whether to store the projection head (`advcl_hub.hub.projector`), that of AdvCL, solo-learn or ProFeAT,
            beside the encoder, which is then without a linear head. DeACL has none, ACL's has batch-norm branches.
        label_names: names of a head's classes, in its order.
        dtype: of the stored weights, `float32` or `float16`.
        origin: where the file comes from, for the record.

    Returns:
        What was made, and its record.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file or one that needs unpickling, another layout, keys without a place (all are listed), no such
            branch or entry, a normalisation that has to be given, label names for another number of classes, no projection
            head that can be kept, outputs that differ, or a folder that holds something else.
        OSError: the folder cannot be written.
    """
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"layout must be auto, {', '.join(LAYOUTS)}; got {layout!r}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if keep_head and keep_projector:
        raise ValueError(
            "A projection head is stored beside an encoder, not a classifier: keep one head, linear or projection."
        )
    check_replaceable(Path(folder))
    check_writable(Path(folder).absolute().parent)  # where the new folder is filled, and takes the place of an earlier one
    checkpoint = read_checkpoint(file, entry)
    state = checkpoint.state
    try:
        found = _layout(state, layout)
        shape = outline(state, found, architecture)
        if size is not None:
            shape = _resized(shape, found, size)
        taken = _branch(found, branch)
        normalisation = _normalisation(state, found, mean, std)
        unwanted = "linear head, which was not wanted" if keep_head is False else ""
        if keep_projector:
            unwanted = "linear head: the encoder has its projection head instead"
        classes, without = _head(state, found, unwanted)
        model = _build(shape, classes, normalisation)
        projector = projection_head(state, found, cast(int, model.num_features)) if keep_projector else None
        placement = place(state, found, taken, model, without)
        if label_names and len(label_names) != classes:
            has = f"a head of {classes} classes" if classes else "no head"
            raise ValueError(f"has {has}, but {len(label_names)} label names were given")
    except ValueError as error:
        raise ValueError(f"{checkpoint.file} {error}{'' if chr(10) in str(error) else '.'}") from None
    model.load_state_dict(placement.state)
    difference = check_outputs(model, checkpoint, found, taken, normalisation, bool(classes))
    kept = () if projector is None else {key for key in state if key.startswith(f"{found.projector}.")}
    dropped = {reason: [key for key in keys if key not in kept] for reason, keys in placement.dropped.items()}
    record = {
        "kind": "classifier" if classes else "encoder",
        "origin": origin,
        "file": checkpoint.file,
        "file_sha256": checkpoint.sha256,
        "entry": checkpoint.entry,
        "other_entries": list(checkpoint.others),
        "layout": found.name,
        "branch": taken,
        "architecture": shape.architecture,
        "outputs": classes or model.num_features,
        "normalisation": {"mean": normalisation.mean, "std": normalisation.std, "from": normalisation.origin},
        "dropped": checkpoint.left | {reason: keys for reason, keys in dropped.items() if keys},
        "notes": _notes(state, found, normalisation, projector),
        "output_check": {"images": _IMAGES, "seed": _SEED, "largest_difference": difference},
        "versions": versions(),
    }
    names = label_names if classes else ()
    export_folder(
        model, folder, results=record, model_args=shape.arguments, label_names=names, dtype=dtype, projector=projector
    )
    return Conversion(Path(folder), found.name, taken, record, tuple(_hints(found, normalisation, classes)))


def check_outputs(
    model: nn.Module,
    checkpoint: Checkpoint,
    layout: Layout,
    branch: str | None,
    normalisation: Normalisation,
    classifier: bool,
) -> float:
    """Compares a converted model with the published network on random images in [0, 1], in float64.

    Returns:
        The largest absolute difference, relative to the largest absolute output.

    Raises:
        ValueError: it is not rounding.
    """
    state = {key: value.double() for key, value in checkpoint.state.items()}
    ours = copy.deepcopy(model).double().eval()
    cfg: Any = model.pretrained_cfg
    images = torch.rand(_IMAGES, *cfg["input_size"], generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    with torch.no_grad():
        if normalisation.in_file:
            mean, std = (state[key] for key in layout.normalize)
        else:
            mean, std = (torch.tensor(values).double() for values in (normalisation.mean, normalisation.std))
        inputs = (images - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)
        number = None if branch is None else layout.branches.index(branch)
        theirs = published_features(state, inputs, number, layout.root, layout.stem_padding)
        if classifier:
            theirs = theirs @ state[f"{layout.head}.weight"].T + state[f"{layout.head}.bias"]
        mean, std = (torch.tensor(cfg[key]).double().reshape(-1, 1, 1) for key in ("mean", "std"))
        difference = ((ours((images - mean) / std) - theirs).abs().max() / theirs.abs().max()).item()
    if not difference < _TOLERANCE:
        raise ValueError(
            f"{checkpoint.file} computes something else after its conversion (relative difference {difference:.1e}): its "
            f"network is not the one of the layout {layout}. Nothing was written."
        )
    return difference


def _layout(state: Mapping[str, Tensor], asked: str) -> Layout:
    found = detect_layout(state, asked)
    if asked not in ("auto", found.name):
        raise ValueError(f"is not in the layout {asked!r}: its keys are those of {found}")
    if found.branches:  # ACL trained without its adversarial half has the first one only
        there = [name for i, name in enumerate(found.branches) if any(f".bn_list.{i}." in key for key in state)]
        return replace(found, branches=found.branches[: 1 + found.branches.index(there[-1])]) if there else found
    return found


def _resized(shape: Outline, layout: Layout, size: int) -> Outline:
    if layout.fixed_size and size != shape.size:
        raise ValueError(f"takes images of {shape.size}x{shape.size} only (its pooling has a fixed size), not {size}x{size}")
    if size < shape.reduction:
        raise ValueError(f"takes images of {shape.reduction} pixels at least, not {size}")
    return replace(shape, size=size)


def _branch(layout: Layout, asked: str | None) -> str | None:
    if asked is None:
        return layout.branches[min(1, len(layout.branches) - 1)] if layout.branches else None
    if asked not in layout.branches:
        has = (
            ", ".join(f"{name} (published as {_PUBLISHED[name]})" for name in layout.branches) or "one batch norm, no branches"
        )
        raise ValueError(f"has no batch-norm branch {asked!r}; it has {has}")
    return asked


def _normalisation(
    state: Mapping[str, Tensor],
    layout: Layout,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
) -> Normalisation:
    if (mean is None) != (std is None):
        raise ValueError("needs both mean and std, or neither")
    names = " and ".join(layout.normalize)
    if len(there := [key for key in layout.normalize if key in state]) == 1:
        raise ValueError(f"is not complete: of {names} it has {there[0]} only")
    if mean is not None and std is not None:
        given = [[float(v) for v in (value if isinstance(value, Sequence) else [value])] for value in (mean, std)]
        given = [value * 3 if len(value) == 1 else value for value in given]
        if any(len(value) != 3 or not all(map(math.isfinite, value)) for value in given) or min(given[1]) <= 0:
            raise ValueError(f"cannot take mean {mean} and std {std}: give one number or three, std above 0")
        return Normalisation(given[0], given[1], "as given")
    if there:
        buffers = [state[key].flatten().float() for key in layout.normalize]
        if any(len(b) != 3 or not b.isfinite().all() for b in buffers) or buffers[1].min() <= 0:
            raise ValueError(f"holds a {names} that are no normalisation of three channels")
        return Normalisation(_decimal(buffers[0]), _decimal(buffers[1]), f"the file's {names}", in_file=True)
    if layout.name == "advcl":
        return Normalisation([0.0] * 3, [1.0] * 3, "none, as AdvCL publishes it")
    if layout.name == "kuangliu":
        usual = (
            "kuangliu's main.py takes mean (0.4914, 0.4822, 0.4465) and std (0.2023, 0.1994, 0.2010), adversarially trained "
            "networks in this layout mostly take images in [0, 1] as they are, mean 0 and std 1"
        )
    elif layout.name == "solo":
        usual = (
            "solo-learn's loaders normalise CIFAR-10 by mean (0.4914, 0.4822, 0.4465) and std (0.2470, 0.2435, 0.2616), in old "
            "versions std (0.247, 0.243, 0.261), and CIFAR-100 by mean (0.5071, 0.4865, 0.4409) and std (0.2673, 0.2564, "
            "0.2762); DeACL's ResNet-50 takes images in [0, 1] as they are, mean 0 and std 1"
        )
    else:
        usual = (
            "ACL's and DynACL's own networks have mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225) in buffers that "
            "this file lacks, other networks take images in [0, 1] as they are, mean 0 and std 1"
        )
    raise ValueError(f"does not tell how its images are normalised, so mean and std have to be given: {usual}")


def _decimal(values: Tensor) -> list[float]:
    """The shortest decimals that are these floats: 0.485, not 0.48500001430511475."""
    return [float(str(value)) for value in values.numpy()]


def _head(state: Mapping[str, Tensor], layout: Layout, unwanted: str) -> tuple[int, str]:
    """The number of classes of the head that is kept, else 0 and why it is left out."""
    tensors = [state[key] for key in (f"{layout.head}.weight", f"{layout.head}.bias") if key in state]
    if not tensors or tensors[0].ndim == 0:
        return 0, ""
    if unwanted:
        return 0, unwanted
    if not any(tensor.any() for tensor in tensors):
        return 0, "linear head of zeros, never trained"
    return tensors[0].shape[0], ""


def _build(shape: Outline, classes: int, normalisation: Normalisation) -> nn.Module:
    side = max(1, math.ceil((shape.size + 2 * (shape.stem_padding - 1)) / shape.reduction))
    cfg = {
        "num_classes": classes,
        "input_size": (3, shape.size, shape.size),
        "pool_size": (side, side),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": tuple(normalisation.mean),
        "std": tuple(normalisation.std),
        "first_conv": "conv1",
        "classifier": "fc",
    }
    return timm.create_model(shape.architecture, num_classes=classes, pretrained_cfg=cfg, **shape.arguments).eval()


def _notes(
    state: Mapping[str, Tensor], layout: Layout, normalisation: Normalisation, projector: nn.Sequential | None
) -> list[str]:
    notes = []
    if layout.normalize[0] in state and not normalisation.in_file:
        mean, std = (_short(_decimal(state[key].flatten().float())) for key in layout.normalize)
        notes.append(f"The file's own normalisation, mean {mean} and std {std}, was replaced on request.")
    if layout.stem_padding != 1:
        notes.append(f"The stem pads images by {layout.stem_padding} pixels, as the code of this layout does: no key tells.")
    if projector is not None:
        other = " (of VIbCReg it is GELU: do not use that head)" if layout.name == "solo" else ""
        notes.append(f"The projection head {layout.projector}.* was kept; what has no weights in it is taken for ReLU{other}.")
    return notes


def _hints(layout: Layout, normalisation: Normalisation, classes: int) -> list[str]:
    hints = []
    if layout.head.endswith("classifier") and classes:
        fitted = "fitted to labels beside pretraining or after it"
        hints.append(f"these {classes} outputs are of {layout.head}, {fitted}: for the encoder alone leave it out (keep_head)")
    if layout.name == "acl" and classes:
        hints.append(f"DynACL++ saves a head of pseudo-labels: if these {classes} outputs are such, leave it out (keep_head)")
    if layout.name == "acl" and not layout.branches and normalisation.in_file:
        hints.append("RobustSSL_Benchmark saves mean and std also for AdvCL and DeACL, unused: if it made this, give 0 and 1")
    return hints


def _short(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else " ".join(f"{value:g}" for value in values)
