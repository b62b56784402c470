"""Pseudo-labels for AdvCL: k-means clusters of an encoder's features, at several K (paper section 4).

    labels = make_pseudo_labels(load_data("cifar10", root=DIR), "resnet18.a1_in1k", cache_dir=DIR).labels

The first split is clustered; images of the other splits get the nearest of its centres. Features are
L2-normalised: distances between unit vectors are cosine distances, which contrastive and softmax training
shape. Standardising would weigh dimensions that hardly vary as much as the informative ones.

A label file is safetensors in the layout of those that the AdvCL authors published; for K = 10, split train:

    train_10      (N,) int16  the cluster of each image in the source's order, -1 where none was computed
    train_digest  (N,) int64  hash of each image's pixels, to refuse labels of other images (absent in theirs)
    metadata                  provenance: data, encoder, sha256 of its weights, K, seed, versions
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from advcl_hub.data import ImageData, batches
from advcl_hub.errors import need
from advcl_hub.files import check_writable, read_safetensors, replacing
from advcl_hub.pretraining.encoder_features import Encoder, open_encoder
from advcl_hub.training.progress import progress_bar

PAPER_KS = (2, 10, 50, 100, 500)  # numbers of clusters in the paper (section 5)
METHOD = "1"  # part of the cache key: raise it with every change that gives other labels for the same input
NUM_STARTS = 3  # k-means++ starts; the one with the least inertia is kept
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

    def fingerprint(self) -> str:
        """sha256 in hex over the labels and ks: the same labels from a file of another name have the same."""
        return hashlib.sha256(repr(self.ks).encode() + self.labels.cpu().contiguous().numpy().tobytes()).hexdigest()


def make_pseudo_labels(
    data: ImageData,
    encoder: str,
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
            "pixels" for raw pixels (no network: for toy data).
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
        ImportError: scikit-learn is not installed.
        ValueError: unusable ks or seed, a class without images, fewer distinct images than clusters, or an
            encoder that cannot be opened or does not fit the images.
        FileNotFoundError: the folder of a "local-dir:" encoder does not exist.
    """
    need("sklearn", "Clustering for pseudo-labels", "pretrain")
    _check_request(data, ks, seed)
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
        check_writable(path.parent)
        tensors = _cluster(splits, model, ks, seed, batch_size, workers)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            save_file(tensors, draft, metadata=_provenance(identity, device))
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
    try:
        file = read_safetensors(path)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(
            f"No pseudo-label file {path}; make one with advcl_hub.pretraining.make_pseudo_labels."
        ) from None
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); make it again.") from error
    provenance = {**file.metadata, "file": path.name, "file_sha256": file.sha256}
    try:
        return _align(file.tensors, provenance, data, split, ks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _provenance(identity: dict[str, str], device: str | torch.device) -> dict[str, str]:
    versions = f"torch {torch.__version__}, timm {timm.__version__}, scikit-learn {version('scikit-learn')}"
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
    from sklearn.cluster import KMeans  # here, but before its threads are limited: most of a second that cached labels need not
    from threadpoolctl import threadpool_limits

    features, digests = {}, {}
    for split, data in splits.items():
        features[split], digests[split] = _embed(data, model, batch_size, workers)
    first = next(iter(splits))
    distinct = len(digests[first].unique())
    if distinct < max(ks):
        name = splits[first].name
        raise ValueError(f"K = {max(ks)} clusters need as many distinct images, {name} has {distinct}.")

    tensors = {f"{split}_digest": _scatter(digests[split], data, 0) for split, data in splits.items()}
    progress = progress_bar(total=sum(ks), desc="k-means", unit="cluster")
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
    with progress_bar(total=len(data), desc=f"features of {data.name}", unit="image") as progress:
        for images, rows in batches(data, batch_size, workers=workers):
            batch = model.features(images)
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
    pattern = re.compile(re.escape(split) + r"_([1-9][0-9]{0,8})")
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
        fractions = column.is_floating_point() or column.is_complex() or column.dtype == torch.bool
        if column.ndim != 1 or fractions or len(column) <= int(indices.max()):
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
    elif data.source_length not in (None, len(column)):  # all that can be checked of the published files
        raise ValueError(
            f"These pseudo-labels are of {len(column)} images and {data.name} has {data.source_length}: they are of other data."
        )
    return PseudoLabels(torch.stack(columns, dim=1), ks, provenance)


def _check_digests(digests: Tensor, data: ImageData) -> None:
    if digests.ndim != 1 or digests.dtype != torch.int64 or len(digests) <= int(data.indices.max()):
        raise ValueError(f"The hashes of the images are {digests.dtype} {tuple(digests.shape)}: the file is damaged.")
    chosen = torch.linspace(0, len(data) - 1, min(len(data), NUM_VERIFIED)).long()
    sample = data.subset(chosen)
    found = torch.cat([_digests(images) for images, _ in batches(sample, NUM_VERIFIED)])
    if different := int((found != digests[sample.indices.cpu()]).sum()):
        raise ValueError(
            f"These pseudo-labels were made of other images: {different} of {len(found)} compared images of "
            f"{data.name} differ. Load the data as it was then (source, split, size, channels), or make the "
            "labels again."
        )
