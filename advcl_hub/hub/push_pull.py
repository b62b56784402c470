"""Exported folders to the Hugging Face Hub and back: all is checked, and neither side ever shows an incomplete copy.

push    verify the folder -> one commit -> download what the Hub now has -> verify that -> tag the version
pull    download to the cache, each file against its sha256 -> a draft beside the folder -> verify -> rename
"""

import difflib
import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in its types

from advcl_hub.files import check_writable, file_sha256
from advcl_hub.hub.cards import card, read_export
from advcl_hub.hub.download import hub_errors
from advcl_hub.hub.export import (
    CARD,
    CHECKED,
    CONFIG,
    EXTRAS,
    PICTURE,
    WEIGHTS,
    check_replaceable,
    recorded_sha256,
    replacing_folder,
    verify_folder,
)
from advcl_hub.hub.projector_file import PROJECTOR
from advcl_hub.hub.registry import find_release, is_model_folder, open_source, releases
from advcl_hub.records import RESULTS

FIRST_VERSION = "v1"


@dataclass(frozen=True)
class Push:
    """What a push did, or, with `dry_run`, would do.

    Attributes:
        repository: `ORG/NAME`.
        version: tag on the Hub; None for a pull request.
        files: name and size in bytes of what is uploaded.
        left_out: names in the folder that are not uploaded.
        card: the rendered README.md.
        commit: on the Hub, None where nothing was done.
        url: of the commit or the pull request.
        unchanged: the Hub had everything already.
    """

    repository: str
    version: str | None
    files: Mapping[str, int]
    left_out: tuple[str, ...]
    card: str
    commit: str | None = None
    url: str | None = None
    unchanged: bool = False


@dataclass(frozen=True)
class _Part:
    """A file to upload, with its names on the Hub: sha256 of large files, git's own of others."""

    content: bytes | Path
    size: int
    sha256: str
    blob: str

    @classmethod
    def of(cls, content: bytes | Path) -> "_Part":
        data = content if isinstance(content, bytes) else content.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return cls(content, len(data), hashlib.sha256(data).hexdigest(), blob)


@dataclass(frozen=True)
class _Remote:
    """What the Hub has: the head of main, and by tag its commit."""

    info: ModelInfo
    tags: Mapping[str, str]


def push(
    folder: str | Path,
    repository: str,
    *,
    version: str = FIRST_VERSION,
    private: bool = False,
    create_pr: bool = False,
    dry_run: bool = False,
) -> Push:
    """Uploads an exported folder to the Hub in one commit, with a card made from its results.json, and tags the version.

        advcl_hub.push("runs/resnet18/export", "ORG/resnet18_cifar.advcl_c10", private=True)

    Only what an export consists of is uploaded: config.json, model.safetensors, golden.safetensors, results.json (without local
    paths), the projection head if it was kept, the card and its picture. A version names weights for good, those of the head
    included: others need another version; a new card of the same weights is committed to main. Interrupt it whenever you like:
    the same call finishes the job. (A repository that the call made may stay behind, empty.)

    Args:
        folder: that `export_folder` wrote, or the name of released weights.
        repository: `ORG/NAME`; made if there is none.
        version: tag of the commit.
        private: make the repository private.
        create_pr: open a pull request instead of committing to main, a new one with every call; no tag is made.
        dry_run: only check, and say what would be uploaded; needs no network and no token.

    Raises:
        ValueError: a damaged folder; no name of a repository or a tag; a version that names other weights; a repository of
            something else.
        OSError: no token, no permission, no network, or the Hub refused.
    """
    if find_release(str(folder)) and not is_model_folder(Path(folder)):
        with tempfile.TemporaryDirectory() as temporary:
            export = pull(str(folder), Path(temporary) / "export")
            return push(export, repository, version=version, private=private, create_pr=create_pr, dry_run=dry_run)
    folder, repository = Path(folder).expanduser(), repository.removeprefix("hf-hub:")
    if repository.count("/") != 1:
        raise ValueError(f"{repository!r} is no name of a Hub repository (ORG/NAME).")
    with hub_errors(repository, ""):
        validate_repo_id(repository)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", version, re.ASCII) or re.fullmatch(r"main|[0-9a-f]{40}", version):
        raise ValueError(f"{version!r} cannot be a version: it is a tag such as v1, of letters, digits, . - and _.")
    text = card(folder, repository, f"hf-hub:{repository}")
    parts = _parts(folder, text)
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in parts))
    sizes = {name: part.size for name, part in parts.items()}
    done = Push(repository, None if create_pr else version, sizes, left_out, text)
    if dry_run:
        return done
    if get_token() is None:
        raise OSError(f"{repository} cannot be pushed to: no token was found; log in with `hf auth login` or set HF_TOKEN.")
    api = HfApi()
    with hub_errors(repository, f"{repository} cannot be pushed to"):
        remote = _remote(api, repository)
        if remote is None and create_pr:
            raise ValueError(f"There is no {repository} yet for a pull request: push without one first.")
        if remote is None:
            api.create_repo(repository, private=private)
            remote = _remote(api, repository)
            assert remote is not None
        different = _differing(remote.info, parts)
        _check_remote(api, remote, repository, parts, different, done.version, private)
        commit, url = remote.info.sha, None
        if different:
            what = "Weights and card" if {WEIGHTS, PROJECTOR} & different else "Card"
            # As of here the Hub has to be as it was looked at: two people who push at once do not mix their files.
            made = api.create_commit(
                repository,
                [
                    *(CommitOperationAdd(name, part.content) for name, part in parts.items()),
                    *(CommitOperationDelete(name) for name in different - parts.keys()),
                ],
                commit_message=f"{what} ({done.version})" if done.version else what,
                create_pr=create_pr,
                parent_commit=remote.info.sha,
            )
            commit, url = made.oid, made.pr_url or made.commit_url
    assert commit is not None
    tagged = create_pr or version in remote.tags
    if different or not tagged:
        _verify_uploaded(repository, commit, parts)
    if not tagged:
        with hub_errors(repository, f"{repository} cannot be tagged {version}"):
            api.create_tag(repository, tag=version, revision=commit)
    return replace(done, commit=commit, url=url, unchanged=tagged and not different)


def pull(name: str, folder: str | Path, *, cache_dir: str | Path | None = None) -> Path:
    """Downloads an export from the Hub to a folder, which appears complete and verified or not at all.

    Args:
        name: `ORG/NAME[@REVISION]`, also with `hf-hub:` in front, or the name of released weights.
        folder: where to; an earlier export there is replaced.
        cache_dir: of downloads, instead of the Hub client's own.

    Raises:
        ValueError: a file is not what results.json says, or the folder holds something else.
        OSError: no such repository, no network, a full disk.
    """
    folder = Path(folder).expanduser()
    check_replaceable(folder)
    check_writable(folder)
    return _pull(name, folder, (*CHECKED, PROJECTOR, *EXTRAS), cache_dir)


def _pull(name: str, folder: Path, wanted: Sequence[str], cache_dir: str | Path | None) -> Path:
    files = _files(name, wanted, cache_dir)
    with replacing_folder(folder) as draft:
        for file, path in files.items():
            shutil.copyfile(path, draft / file)
        verify_folder(draft)
    return folder


def verify(name: str | Path, *, cache_dir: str | Path | None = None) -> float:
    """Checks weights against their sha256 and their golden output.

    Args:
        name: an exported folder, `ORG/NAME[@REVISION]`, also with `hf-hub:` in front, or the name of released weights.
        cache_dir: of downloads.

    Returns:
        The relative difference from the golden output; see `advcl_hub.hub.export.verify_folder`.

    Raises:
        ValueError: something is not as it was exported.
        OSError: no such folder or repository.
    """
    text = str(name).removeprefix("local-dir:")
    if is_model_folder(Path(text).expanduser()) or isinstance(name, Path):
        return verify_folder(Path(text).expanduser())
    with tempfile.TemporaryDirectory() as temporary:
        return verify_folder(_pull(text, Path(temporary) / "export", (*CHECKED, PROJECTOR), cache_dir))


@contextmanager
def described(name: str, *, cache_dir: str | Path | None = None) -> Iterator[tuple[Path, str]]:
    """Opens what describes weights, without downloading them: config.json, results.json and, if there is one, the picture.

    Args:
        name: as for `verify`.
        cache_dir: of downloads.

    Yields:
        A folder that `advcl_hub.hub.cards.card` reads, and what `timm.create_model` opens.
    """
    text = name.removeprefix("local-dir:")
    release = find_release(name)
    if is_model_folder(Path(text)):
        yield Path(text), f"local-dir:{text}"
    elif release is not None and release.folder is not None:
        yield release.folder, release.name
    else:
        with tempfile.TemporaryDirectory() as temporary:
            for file, path in _files(name, (CONFIG, PICTURE), cache_dir).items():
                shutil.copyfile(path, Path(temporary) / file)
            yield Path(temporary), release.name if release else f"hf-hub:{name.removeprefix('hf-hub:')}"


def _files(name: str, wanted: Sequence[str], cache_dir: str | Path | None) -> dict[str, Path]:
    """Where results.json and other files of an export lie, checked.

    The projection head is among them if results.json names it; the `EXTRAS` if there are any and they can be had.
    """
    release = find_release(name)
    if release is None:
        if "/" not in name.partition("@")[0]:
            known = [*dict.fromkeys(release.architecture for release in releases().values()), *releases()]
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else " `advcl-hub list` names those that are released."
            raise ValueError(f"{name} is no folder here, no released weights, and no repository on the Hub (ORG/NAME).{hint}")
        release = open_source(f"hf-hub:{name.removeprefix('hf-hub:')}", cache_dir=cache_dir)
    if why := release.unchecked:
        raise OSError(f"{why}. Without {RESULTS} there is nothing to describe or to verify.")
    if not release.files:
        raise ValueError(f'{name} has no {RESULTS}: not pushed by advcl-hub. timm may open it: "hf-hub:{release.hub_id}".')
    files = {RESULTS: release.fetch(RESULTS, cache_dir)}
    for file in wanted:
        if file == PROJECTOR and PROJECTOR not in recorded_sha256(files[RESULTS]):
            continue
        try:
            files[file] = release.fetch(file, cache_dir)
        except FileNotFoundError:
            if file not in EXTRAS:
                raise
        except OSError as error:
            if file not in EXTRAS:
                raise
            warnings.warn(f"{file} is left out: {error}", stacklevel=3)
    return files


def _parts(folder: Path, text: str) -> dict[str, _Part]:
    """By name in the repository what is uploaded; the folder is verified first."""
    results, _ = read_export(folder)
    verify_folder(folder)
    content: dict[str, bytes | Path] = {name: folder / name for name in recorded_sha256(folder / RESULTS)}
    content |= {RESULTS: (json.dumps(results, indent=2) + "\n").encode(), CARD: text.encode()}
    if (folder / PICTURE).is_file():
        content[PICTURE] = folder / PICTURE
    return {name: _Part.of(part) for name, part in content.items()}


def _remote(api: HfApi, repository: str) -> _Remote | None:
    """None if there is no such repository, or none that the token may see."""
    try:
        info = api.model_info(repository, files_metadata=True)
        return _Remote(info, {tag.name: tag.target_commit for tag in api.list_repo_refs(repository).tags})
    except RepositoryNotFoundError:
        return None


def _check_remote(
    api: HfApi,
    remote: _Remote,
    repository: str,
    parts: Mapping[str, _Part],
    different: set[str],
    version: str | None,
    private: bool,
) -> None:
    """Raises ValueError where a push would hide or replace what somebody relies on."""
    names = {sibling.rfilename for sibling in remote.info.siblings or ()}
    if names - {".gitattributes", CARD} and RESULTS not in names:
        raise ValueError(f"{repository} holds something else ({', '.join(sorted(names)[:5])}): choose another name.")
    if private and not remote.info.private:
        raise ValueError(f"{repository} is public already: make it private on the Hub first, or choose another name.")
    if version is None or version not in remote.tags:
        return
    there = api.model_info(repository, revision=remote.tags[version], files_metadata=True)
    if {WEIGHTS, PROJECTOR, CONFIG} & _differing(there, parts):
        raise ValueError(
            f"{repository} has other weights under version {version}, on which people may rely: give these another "
            f"(there are {', '.join(sorted(remote.tags))})."
        )
    if {WEIGHTS, PROJECTOR} & different:
        raise ValueError(
            f"{repository} has these weights under version {version} already and newer ones on main: give them a new "
            "version to publish them again."
        )


def _differing(info: ModelInfo, parts: Mapping[str, _Part]) -> set[str]:
    """Names of files that the Hub does not have as they are here, the projection head of others among them."""
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    different = {PROJECTOR} & (there.keys() - parts.keys())
    for name, part in parts.items():
        sibling = there.get(name)
        if sibling is None or (sibling.lfs.sha256 != part.sha256 if sibling.lfs else sibling.blob_id != part.blob):
            different.add(name)
    return different


def _verify_uploaded(repository: str, commit: str, parts: Mapping[str, _Part]) -> None:
    """Downloads what the Hub has at a commit, and checks it as a user would, and what has no sha256 in results.json too."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = pull(f"{repository}@{commit}", Path(temporary) / "export", cache_dir=Path(temporary) / "cache")
            for name in parts.keys() - {*CHECKED}:
                if file_sha256(folder / name) != parts[name].sha256:
                    raise ValueError(f"{name} came back changed.")
        except (ValueError, OSError) as error:
            raise OSError(
                f"The upload to {repository} (commit {commit[:8]}) could not be verified: {error} Nothing was tagged; the "
                "same command tries again."
            ) from error
