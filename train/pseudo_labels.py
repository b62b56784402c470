"""Pseudo-labels for AdvCL: k-means clusters of an encoder's features, at several K (paper section 4).

    python -m train.pseudo_labels --data cifar10 --root DIR --encoder resnet18.a1_in1k --output DIR

The first split is clustered; images of the other splits get the nearest of its centres. Features are
L2-normalised: distances between unit vectors are cosine distances, which contrastive and softmax training
shape. Standardising would weigh dimensions that hardly vary as much as the informative ones.

A label file is safetensors in the layout of those that the AdvCL authors published; for K = 10, split train:

    train_10      (N,) int16  the cluster of each image in the source's order, -1 where none was computed
    train_digest  (N,) int64  hash of each image's pixels, to refuse labels of other images (absent in theirs)
    metadata                  provenance: data, encoder, sha256 of its weights, K, seed, versions
"""

import argparse
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sklearn
import timm
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits
from timm.data.config import resolve_model_data_config
from torch import Tensor
from tqdm import tqdm

from advcl_hub.data import ImageData, batches, load_data

PAPER_KS = (2, 10, 50, 100, 500)
METHOD = "1"  # part of the cache key: raise it with every change that gives other labels for the same input
NUM_STARTS = 3  # k-means++ starts; the one with the least inertia is kept
MAX_PIXELS = 3 * 64 * 64  # values an image: beyond that raw pixels are neither meaningful nor affordable
NUM_VERIFIED = 512  # images compared with the digests on load: enough for shifts, cheap for lazy images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PseudoLabels:
    """Cluster labels at several K.

    Attributes:
        labels: int64 (N, len(ks)); row i belongs to image i of the data, column j lies in [0, ks[j]).
        ks: the numbers of clusters.
        provenance: how the labels were made, to be printed with every result that uses them.
    """

    labels: Tensor
    ks: tuple[int, ...]
    provenance: dict[str, str]


class Encoder(NamedTuple):
    """Turns (uint8 images (B, C, H, W), rows (B,) of the data) into float32 features (B, D)."""

    features: Callable[[Tensor, Tensor], Tensor]
    identity: dict[str, str]  # everything the features depend on: name, weights_sha256, preprocessing


def make_pseudo_labels(
    data: ImageData,
    encoder: str | Tensor,
    ks: Sequence[int] = PAPER_KS,
    seed: int = 0,
    *,
    split: str = "train",
    held_out: Mapping[str, ImageData] | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    workers: int = 0,
) -> PseudoLabels:
    """Clusters the encoder's features of the data, or takes the labels from the cache.

    Args:
        data: the images to cluster. Unlabelled images (label -1) are welcome.
        encoder: a timm model with weights ("resnet18.a1_in1k", "hf-hub:org/name", "local-dir:FOLDER"), or
            "pixels" for raw pixels (no network: for tests and toy data), or float features (N, D).
        ks: distinct numbers of clusters, each at least 2.
        seed: of the k-means++ starts.
        split: name of the data's split in the label file.
        held_out: further splits of the label file, by name; their images get the nearest centre.
        cache_dir: folder of label files. One made from the same data, encoder, weights, ks, seed and method
            is reused.
        device: where a network computes its features, in float32.
        batch_size: images a forward pass.
        workers: processes that decode images which are not in memory.

    Raises:
        ValueError: unusable ks or seed, a class without images, fewer distinct images than clusters, or an
            encoder that cannot be opened or does not fit the images.
        FileNotFoundError: the folder of a "local-dir:" encoder does not exist.
    """
    _check_request(data, ks, seed)
    if isinstance(encoder, Tensor) and held_out:
        raise ValueError("Features were given for the data alone; held_out needs an encoder's name instead.")
    splits = {split: data, **(held_out or {})}
    model = open_encoder(encoder, data, device)
    identity = {
        "method": METHOD,
        "data": data.name,
        **{f"{name}_fingerprint": part.fingerprint() for name, part in splits.items()},
        **model.identity,
        "k": " ".join(str(k) for k in sorted(ks)),
        "seed": str(seed),
    }
    if cache_dir is None:
        tensors = _cluster(splits, model, ks, seed, batch_size, workers)
        return _align(tensors, _provenance(identity, device), data, split, ks)

    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    stem = re.sub(r"[^\w.-]+", "_", f"{data.name}-{identity['encoder']}-{key}")
    path = Path(cache_dir) / f"{stem}.safetensors"
    cached = path.is_file()
    if not cached:
        tensors = _cluster(splits, model, ks, seed, batch_size, workers)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata=_provenance(identity, device))
        os.replace(temporary, path)
    log.info("Pseudo-labels %s %s", "found in the cache:" if cached else "written to", path)
    return load_pseudo_labels(path, data, split, ks)


def load_pseudo_labels(
    path: str | Path, data: ImageData, split: str = "train", ks: Sequence[int] | None = None
) -> PseudoLabels:
    """Loads a label file, ours or the published one, and aligns it with the data through `data.indices`.

    Args:
        path: the safetensors file.
        data: any subset or order of the split.
        split: which split of the file the data comes from.
        ks: the numbers of clusters wanted, in the order of the columns; None: all there are, ascending.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, a split or K it lacks, too few labels for the data, labels outside
            [0, K), or labels that were made of other images.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No pseudo-label file {path}; make one with python -m train.pseudo_labels.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            provenance = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); make it again.") from error
    provenance |= {"file": path.name, "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return _align(tensors, provenance, data, split, ks)


def open_encoder(encoder: str | Tensor, data: ImageData, device: str | torch.device = "cpu") -> Encoder:
    """Opens what `make_pseudo_labels` calls an encoder; arguments and errors as there."""
    channels, height, width = data.shape
    if isinstance(encoder, Tensor):
        if encoder.ndim != 2 or len(encoder) != len(data) or not encoder.is_floating_point():
            raise ValueError(
                f"Expected float features ({len(data)}, D), got {encoder.dtype} {tuple(encoder.shape)}."
            )
        given = encoder.detach().float().cpu()
        identity = _identity("given features", _sha256({"features": given}), "given")
        return Encoder(lambda _, rows: given[rows.cpu()], identity)
    if encoder == "pixels":
        if channels * height * width > MAX_PIXELS:
            raise ValueError(f"Raw pixels are for small images, got {data.shape}; name a timm encoder.")
        return Encoder(lambda images, _: images.flatten(1) / 255, _identity("pixels", "none", "pixels / 255"))

    model = _load_network(encoder).to(device)
    config = resolve_model_data_config(model)
    size, mode = config["input_size"], config["interpolation"]
    if size[0] != channels:
        raise ValueError(f"{encoder} takes {size[0]} channels, {data.name} was loaded with {channels}.")
    mode = mode if mode in ("bilinear", "bicubic") else "bicubic"  # timm also knows "random", "lanczos", ...
    mean, std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))

    def features(images: Tensor, rows: Tensor) -> Tensor:
        batch = images.to(device) / 255
        if batch.shape[1:] != size:
            batch = F.interpolate(batch, size[1:], mode=mode, antialias=True).clamp(0, 1)
        with torch.autocast(torch.device(device).type, enabled=False):
            output: Tensor = model((batch - mean) / std)
        return output

    name = (
        f"local-dir:{Path(encoder.removeprefix('local-dir:')).resolve().name}"
        if encoder.startswith("local-dir:")
        else encoder
    )
    preprocessing = f"{size} {mode}, mean {config['mean']}, std {config['std']}"
    return Encoder(features, _identity(name, _sha256(model.state_dict()), preprocessing))


def _load_network(name: str) -> torch.nn.Module:
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:"):
        if not folder.is_dir():
            raise FileNotFoundError(f"The encoder {name!r} does not exist: {folder} is not a folder.")
        if not (folder / "model.safetensors").is_file():  # timm would fall back to pickled weights
            raise ValueError(f"{folder} has no model.safetensors; write it with timm.models.save_for_hf.")
    try:
        # With num_classes=0 timm would load non-strictly and leave missing weights random.
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm, the Hub client and safetensors share no base class
        reason = " ".join(str(error).split())  # some messages have many lines
        raise ValueError(
            f"Cannot open the encoder {name!r} ({reason}). Expected a timm model that has weights "
            "('resnet18.a1_in1k', 'hf-hub:org/name', 'local-dir:FOLDER') or 'pixels'."
        ) from error
    model.reset_classifier(0)  # type: ignore[operator]  # every timm model has it
    return model.eval()


def _identity(name: str, weights_sha256: str, preprocessing: str) -> dict[str, str]:
    return {"encoder": name, "weights_sha256": weights_sha256, "preprocessing": preprocessing}


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _provenance(identity: dict[str, str], device: str | torch.device) -> dict[str, str]:
    versions = f"torch {torch.__version__}, timm {timm.__version__}, scikit-learn {sklearn.__version__}"
    how = f"k-means on L2-normalised features, best of {NUM_STARTS} k-means++ starts"
    return identity | {"clustering": how, "versions": versions, "device": str(device)}


def _check_request(data: ImageData, ks: Sequence[int], seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"The seed must be from 0 to 2**32 - 1, got {seed}.")
    if not ks or len(set(ks)) != len(ks) or min(ks) < 2:
        raise ValueError(f"The numbers of clusters must be distinct and at least 2, got {list(ks)}.")
    if max(ks) > len(data):
        raise ValueError(f"K = {max(ks)} clusters need at least as many images, {data.name} has {len(data)}.")
    known = data.labels[data.labels >= 0].cpu()
    counts = torch.bincount(known, minlength=len(data.classes))
    empty = [name for name, count in zip(data.classes, counts.tolist(), strict=True) if count == 0]
    if len(known) and empty:
        raise ValueError(
            f"{data.name} has no images of {len(empty)} of {len(counts)} classes ({', '.join(empty[:5])}). "
            "Clusters of some classes do not serve all of them: check the folder or subset."
        )


def _cluster(
    splits: Mapping[str, ImageData],
    model: Encoder,
    ks: Sequence[int],
    seed: int,
    batch_size: int,
    workers: int,
) -> dict[str, Tensor]:
    """The tensors of a label file: k-means on the first split, nearest centres for the others."""
    features, digests = {}, {}
    for split, data in splits.items():
        features[split], digests[split] = _embed(data, model, batch_size, workers)
    first = next(iter(splits))
    distinct = len(digests[first].unique())
    if distinct < max(ks):
        name = splits[first].name
        raise ValueError(f"K = {max(ks)} clusters need as many distinct images, {name} has {distinct}.")

    tensors = {f"{split}_digest": _scatter(digests[split], data, 0) for split, data in splits.items()}
    progress = tqdm(total=sum(ks), desc="k-means", unit="cluster")
    # One thread: sums split over threads depend on their number in the last bit, and the labels with them.
    # It costs nothing on two cores, and the threads of BLAS and OpenMP do not fight on a busy machine.
    with progress, threadpool_limits(1):
        for k in ks:
            dtype = torch.int16 if k <= 2**15 else torch.int64
            kmeans = KMeans(k, n_init=NUM_STARTS, random_state=seed).fit(features[first].numpy())
            for split, data in splits.items():
                labels = torch.from_numpy(kmeans.predict(features[split].numpy())).to(dtype)
                tensors[f"{split}_{k}"] = _scatter(labels, data, -1)
            progress.update(k)
    return tensors


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def _embed(data: ImageData, model: Encoder, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    """Unit features (N, D) and pixel digests (N,), both on the CPU, in the order of the data."""
    features, digests = [], []
    with tqdm(total=len(data), desc=f"features of {data.name}", unit="image") as progress:
        for images, rows in batches(data, batch_size, workers=workers):
            batch = model.features(images, rows)
            if batch.ndim != 2 or not batch.isfinite().all():
                raise ValueError(f"Expected finite features (B, D), got shape {tuple(batch.shape)} or NaN.")
            features.append(F.normalize(batch, dim=1).cpu())
            digests.append(_digests(images))
            progress.update(len(rows))
    return torch.cat(features), torch.cat(digests)


def _digests(images: Tensor) -> Tensor:
    hashes = [hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest() for image in images.cpu()]
    return torch.tensor([int.from_bytes(value, "little", signed=True) for value in hashes], dtype=torch.int64)


def _scatter(values: Tensor, data: ImageData, missing: int) -> Tensor:
    """From the order of the data to the order of its source."""
    column = values.new_full((int(data.indices.max()) + 1,), missing)
    column[data.indices.cpu()] = values
    return column


def _align(
    tensors: Mapping[str, Tensor],
    provenance: dict[str, str],
    data: ImageData,
    split: str,
    ks: Sequence[int] | None,
) -> PseudoLabels:
    """From the order of the source to the order of the data, with every check there is."""
    pattern = re.compile(re.escape(split) + r"_(\d+)")
    available = sorted(int(match[1]) for key in tensors if (match := pattern.fullmatch(key)))
    if not available:
        raise ValueError(f"There are no labels of the split {split!r}, only {', '.join(sorted(tensors))}.")
    ks = tuple(available if ks is None else ks)
    if missing := [k for k in ks if k not in available]:
        raise ValueError(f"There are no labels for K = {missing}, only for {available}.")
    indices = data.indices.cpu()
    columns = []
    for k in ks:
        column = tensors[f"{split}_{k}"]
        if column.ndim != 1 or column.is_floating_point() or len(column) <= int(indices.max()):
            raise ValueError(
                f"{split}_{k} holds {column.dtype} {tuple(column.shape)}, but {data.name} has an image at "
                f"position {int(indices.max())} of its source: they are of other data or another split."
            )
        labels = column[indices].long()
        if outside := int(((labels < 0) | (labels >= k)).sum()):
            raise ValueError(f"{outside} of the {len(labels)} labels of {split}_{k} lie outside [0, {k}).")
        columns.append(labels)
    if (digests := tensors.get(f"{split}_digest")) is not None:
        _check_digests(digests, data)
    return PseudoLabels(torch.stack(columns, dim=1), ks, provenance)


def _check_digests(digests: Tensor, data: ImageData) -> None:
    chosen = torch.linspace(0, len(data) - 1, min(len(data), NUM_VERIFIED)).long()
    sample = data.subset(chosen)
    found = torch.cat([_digests(images) for images, _ in batches(sample, NUM_VERIFIED)])
    if different := int((found != digests[sample.indices.cpu()]).sum()):
        raise ValueError(
            f"These pseudo-labels were made of other images: {different} of {len(found)} compared images of "
            f"{data.name} differ. Load the data as it was then (source, split, size, channels), or make the "
            "labels again."
        )


def purity(labels: Tensor, classes: Tensor) -> float:
    """Fraction of images whose class is the most frequent one of their cluster.

    Args:
        labels: clusters, integers (N,) from 0.
        classes: classes of the same images, integers (N,) from 0.

    Raises:
        ValueError: no images, negative entries, or labels and classes of different length.
    """
    return int(_contingency(labels, classes).amax(dim=1).sum()) / len(labels)


def _contingency(labels: Tensor, classes: Tensor) -> Tensor:
    """(clusters, classes) counts of images."""
    fits = labels.ndim == 1 and labels.shape == classes.shape and len(labels) > 0
    if not fits or min(labels.min(), classes.min()) < 0:
        raise ValueError(
            "Expected labels and classes of the same images, (N,) and not negative, "
            f"got {tuple(labels.shape)} and {tuple(classes.shape)}."
        )
    labels, classes = labels.long().cpu(), classes.long().cpu()
    width = int(classes.max()) + 1
    pairs = torch.bincount(labels * width + classes, minlength=(int(labels.max()) + 1) * width)
    return pairs.view(-1, width)


class ClusterStats(NamedTuple):
    """How the clusters of one K agree with the classes (nan where there are none), and how large they are.

    Sizes int64 (k,) count images, ascending, empty clusters included.
    """

    k: int
    purity: float
    nmi: float
    sizes: Tensor


def cluster_stats(labels: Tensor, ks: Sequence[int], classes: Tensor) -> list[ClusterStats]:
    """Compares clusters (N, len(ks)) with class labels (N,); images without one (-1) only count as sizes."""
    classes = classes.cpu()
    known = classes >= 0
    stats = []
    for k, column in zip(ks, labels.T.cpu(), strict=True):
        pure, nmi = math.nan, math.nan
        if known.any():
            pure = purity(column[known], classes[known])
            nmi = float(normalized_mutual_info_score(classes[known], column[known]))
        stats.append(ClusterStats(k, pure, nmi, torch.bincount(column, minlength=k).sort().values))
    return stats


def format_stats(stats: Sequence[ClusterStats]) -> str:
    """A table with a row per K; smallest, median and largest are those of the clusters that have images."""
    lines = ["    K  purity    NMI  smallest  median  largest  empty"]
    for k, pure, nmi, sizes in stats:
        used = sizes[sizes > 0]
        low, middle, high = int(used[0]), round(float(used.double().quantile(0.5))), int(used[-1])
        row = f"{k:>5}  {pure:>6.3f}  {nmi:>5.3f}  {low:>8}  {middle:>6}  {high:>7}  {k - len(used):>5}"
        lines.append(row)
    return "\n".join(lines)


def draw_report(labels: Tensor, ks: Sequence[int], data: ImageData, path: str | Path, encoder: str) -> None:
    """Draws agreement with the classes, cluster sizes, and images of the first 10 clusters of one K, as PNG.

    Args:
        labels: clusters int64 (N, len(ks)) of the N images of the data.
        ks: the numbers of clusters; images are shown for K = 10, or else the K nearest to it.
        data: the images.
        path: the PNG file.
        encoder: what the clusters are of, for the title.
    """
    figure = Figure(figsize=(16, 9), layout="constrained", dpi=110)
    figure.suptitle(f"{data.name}, {len(data):,} images: clusters of {encoder}", fontsize=15)
    panels = figure.subplot_mosaic([["agreement", "images"], ["sizes", "images"]], width_ratios=(1, 1.7))
    stats = cluster_stats(labels, ks, data.labels)
    _draw_agreement(panels["agreement"], stats)
    _draw_sizes(panels["sizes"], stats)
    column = min(range(len(ks)), key=lambda j: abs(ks[j] - 10))
    _draw_images(panels["images"], labels[:, column].cpu(), ks[column], data)
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _draw_agreement(axes: Axes, stats: Sequence[ClusterStats]) -> None:
    positions = torch.arange(len(stats)).numpy()
    for offset, values, colour, label in (
        (-0.2, [one.purity for one in stats], "#3b6fb6", "purity"),
        (0.2, [one.nmi for one in stats], "#b9c9e0", "normalised mutual information"),
    ):
        bars = axes.bar(positions + offset, values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2)
    axes.set_xticks(positions, [str(one.k) for one in stats])
    axes.set(xlabel="K", ylim=(0, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_title("Agreement with the classes", loc="left")
    axes.legend(frameon=False, loc="upper left", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sizes(axes: Axes, stats: Sequence[ClusterStats]) -> None:
    colours = colormaps["viridis"](torch.linspace(0, 0.88, len(stats)).numpy())
    for one, colour in zip(stats, colours, strict=True):
        relative = one.sizes.flip(0) / one.sizes.float().mean()
        places = (torch.arange(one.k) + 0.5) / one.k
        axes.plot(places.numpy(), relative.numpy(), ".-", color=colour, label=f"K = {one.k}")
    axes.axhline(1, color="grey", lw=0.8, ls=":")
    axes.set(yscale="log", xticks=[], xlabel="clusters, from the largest to the smallest")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("Cluster sizes, relative to the mean", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_images(axes: Axes, labels: Tensor, k: int, data: ImageData) -> None:
    """A row of random images for each of the first clusters; a dot marks those not of the main class."""
    rows, columns, gap = min(k, 10), 12, 0.04
    generator = torch.Generator().manual_seed(0)
    classes = data.labels.cpu()
    names = []
    for row in range(rows):
        members = (labels == row).nonzero()[:, 0]
        names.append(f"{row}   {len(members):,} images")
        if len(members) == 0:
            continue
        main = int(classes[members].mode().values)
        if main >= 0:
            names[-1] += f"\n{(classes[members] == main).float().mean():.0%} {data.classes[main]}"
        chosen = data.subset(members[torch.randperm(len(members), generator=generator)[:columns]])
        images, _ = next(iter(batches(chosen, columns)))
        for column, image in enumerate(images.cpu()):
            extent = (column + gap, column + 1 - gap, row + 1 - gap, row + gap)
            axes.imshow(image.permute(1, 2, 0).numpy(), extent=extent, cmap="gray", vmin=0, vmax=255)
            if main != int(chosen.labels[column]):
                axes.plot(column + 0.86, row + 0.14, "o", color="#e4572e", ms=6, mec="white")
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], aspect="equal")
    axes.set_yticks(torch.arange(rows).numpy() + 0.5, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    title = f"Random images of clusters 0 to {rows - 1} at K = {k} (dot: not of the cluster's main class)"
    axes.set_title(title, loc="left")


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m train.pseudo_labels", description=summary)
    add = parser.add_argument
    add("--data", required=True, help="source as in advcl_hub.data.load_data: cifar10, folder:PATH, ...")
    add("--root", type=Path, help="folder that holds the data")
    add("--download", action="store_true", help="fetch the data into --root if absent")
    add("--size", type=int, help="height and width of the images; training has to use the same")
    add("--splits", nargs="+", default=["train", "test"], help="the first is clustered, the others assigned")
    add("--encoder", required=True, help="timm model, hf-hub:org/name, local-dir:FOLDER, or pixels")
    add("--k", type=int, nargs="+", default=list(PAPER_KS), help="numbers of clusters")
    add("--seed", type=int, default=0, help="of the k-means++ starts")
    add("--output", type=Path, required=True, help="folder for the label file and its picture")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the encoder")
    add("--batch-size", type=int, default=256, help="images a forward pass")
    add("--workers", type=int, default=0, help="processes that decode the images of large data sets")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes a label file, or finds it in --output, and reports on its clusters."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        splits = {
            split: load_data(args.data, split, root=args.root, size=args.size, download=args.download)
            for split in args.splits
        }
        first = args.splits[0]
        data = splits.pop(first)
        pseudo = make_pseudo_labels(
            data,
            args.encoder,
            args.k,
            args.seed,
            split=first,
            held_out=splits,
            cache_dir=args.output,
            device=args.device,
            batch_size=args.batch_size,
            workers=args.workers,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(format_stats(cluster_stats(pseudo.labels, pseudo.ks, data.labels)))
    picture = (args.output / pseudo.provenance["file"]).with_suffix(".png")
    draw_report(pseudo.labels, pseudo.ks, data, picture, pseudo.provenance["encoder"])
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
