"""Heads in the package: of a classifier on the frozen encoder of another release, only the head is stored."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file

from advcl_hub.files import make_readable
from advcl_hub.hub.export import WEIGHTS
from advcl_hub.hub.parts import contains, read, rebuilds
from advcl_hub.hub.released import Release

HEAD = "head.safetensors"  # the tensors that the encoder does not have


def encoders_below(folders: Mapping[str, Path], others: Sequence[Release], package: Path) -> dict[str, str]:
    """By name of a release the name of the one in the package that has all its tensors but those of the head.

    Args:
        folders: exported ones that go into the package, by name.
        others: releases that stay as they are.
        package: folder of the weights in the package.
    """
    architectures = {_architecture(name) for name in folders}
    states = {
        other.name: read(package / other.name / WEIGHTS)
        for other in others
        if in_package(other, package) and not other.parts and other.architecture in architectures
    }
    found: dict[str, str] = {}
    given = {name: read(folder / WEIGHTS) for name, folder in folders.items()}
    for name, state in sorted(given.items(), key=lambda item: len(item[1])):  # an encoder before its classifiers
        for other, base in states.items():
            same = _architecture(other) == _architecture(name) and len(state) > len(base) and contains(state, base)
            if same and rebuilds(state, folders[name] / WEIGHTS):
                found[name] = other
                break
        else:
            states[name] = state
    return found


def _architecture(name: str) -> str:
    return name.partition(".")[0]


def write_head(weights: Path, encoder: Path, head: Path) -> None:
    """Writes the tensors of a classifier that its encoder does not have."""
    rest = read(encoder)
    save_file({key: value for key, value in read(weights).items() if key not in rest}, head, metadata={"format": "pt"})
    make_readable(head)


def check_shared(known: Mapping[str, Release], stored: Mapping[str, Path], given: Collection[str], package: Path) -> None:
    """Checks that no release loses the encoder that it shares.

    Args:
        known: the releases before the call.
        stored: exported folders whose whole weights go into the package, by name.
        given: names of all releases in the call.
        package: folder of the weights in the package.

    Raises:
        ValueError: an encoder is replaced, or leaves the package, without the heads on it.
    """
    lost: dict[str, list[str]] = {}
    for release in known.values():
        if release.name in given or not in_package(release, package) or not release.parts:
            continue
        encoder = release.parts[0].parent.name
        if encoder in given and not (encoder in stored and contains(read(stored[encoder] / WEIGHTS), read(release.parts[0]))):
            lost.setdefault(encoder, []).append(release.name)
    for encoder, names in lost.items():
        raise ValueError(
            f"Of {', '.join(names)} only the head is stored, on {encoder}: release them in one call; or, to move "
            f"{encoder} to the Hub, move them there before."
        )


def in_package(release: Release, package: Path) -> bool:
    """Whether the files of a release lie in the package."""
    return release.folder is not None and release.folder.parent == package
