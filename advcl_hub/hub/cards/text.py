"""The text of a model card: what weights are, how they were made, what was measured, and the limits of that."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from advcl_hub.files import replacing
from advcl_hub.hub.cards.metadata import metadata
from advcl_hub.hub.cards.provenance import (
    PROTOCOLS,
    finetunings,
    is_advcl,
    is_lp_aff,
    is_robust,
    method,
    pretraining,
    pretrainings,
    started_from,
)
from advcl_hub.hub.cards.results import read_export
from advcl_hub.hub.cards.seeds import seeds_table
from advcl_hub.hub.export import CARD, PICTURE
from advcl_hub.hub.released import Release, load_releases
from advcl_hub.records import RESULTS, counted, in_markdown, pixels
from advcl_hub.records.tables import report

# Of the safetensors file of the labels that the authors of AdvCL published for CIFAR-10.
_PUBLISHED_LABELS = "26b90406be84225f8a3fa9c80d625f8d53edb53da25638c4383eb009eebd17be"
_TEMPLATE = Path(__file__).with_name("card.md")
_ADVCL = """@inproceedings{fan2021advcl,
  title     = {When Does Contrastive Learning Preserve Adversarial Robustness from Pretraining to Finetuning?},
  author    = {Fan, Lijie and Liu, Sijia and Chen, Pin-Yu and Zhang, Gaoyuan and Gan, Chuang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021},
  eprint    = {2111.01124},
  archiveprefix = {arXiv}
}"""


def write_card(folder: str | Path, name: str | None = None, load: str | None = None) -> Path:
    """Writes an export's card, README.md, from what stands in the folder; see `card`."""
    path = Path(folder) / CARD
    text = card(folder, name, load)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def card(folder: str | Path, name: str | None = None, load: str | None = None) -> str:
    """The model card of an exported folder, with the metadata that the Hub reads.

    Args:
        folder: that `export_folder` wrote.
        name: title, by default the folder's name.
        load: what `timm.create_model` opens, by default the folder.

    Raises:
        ValueError, OSError: see `read_export`; or what results.json says is not what `advcl_hub` writes.
    """
    folder = Path(folder)
    results, config = read_export(folder)
    try:
        return _render(folder, results, config, name or folder.absolute().name, load or f"local-dir:{folder}")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of others' files
        raise ValueError(f"{folder / RESULTS} cannot be made a card of ({error!r}): export or pull it again.") from error


def _render(folder: Path, results: Mapping[str, Any], config: Mapping[str, Any], title: str, load: str) -> str:
    data = metadata(title, results, config, results.get("evaluations", []), pretraining(results))
    recipes = _recipes(pretraining(results))  # in a block of code, to be saved as they are
    results, config = _escaped(results), _escaped(config)
    cfg, classes = config.get("pretrained_cfg", {}), tuple(config.get("label_names") or ())
    if not classes and config.get("num_classes"):
        classes = tuple(str(i) for i in range(config["num_classes"]))
    evaluations, others = results.get("evaluations", []), results.get("other_seeds", [])
    checked = [bool(other["protocol"].get("check_images")) for other in others]
    mean, std = cfg.get("mean", [0.0]), cfg.get("std", [1.0])
    plain = not any(mean) and all(value == 1 for value in std)
    made = pretraining(results)
    seed = made["recipe"].get("seed") if made else None
    fields = {
        "name": _line(title),
        "load": load,
        "quoted": shlex.quote(load),
        "summary": summary(results, config),
        "classes": [_line(name) for name in classes],
        "features": config.get("num_features"),
        "size": "x".join(map(str, cfg.get("input_size", ())[1:])),
        "projector": _projector(results),
        "normalisation": "without normalisation" if plain else f"normalised with mean {mean} and standard deviation {std}",
        "table": report(evaluations, "markdown") if evaluations else None,
        "seeds": seeds_table(evaluations, others, seed),
        "unchecked_seeds": None if all(checked) else "Some of the" if any(checked) else "The",
        "seed": seed,
        "corruptions": _corruptions(evaluations),
        "checks": _checks(evaluations),
        "commands": [
            f"`{e['command']}`, {e['seconds']:,.0f} s on {e['hardware']['name']}" for e in evaluations if e["command"]
        ],
        "picture": PICTURE if (folder / PICTURE).is_file() else None,
        "caption": _caption(results.get("picture_of")),
        "threat": _threat(evaluations, results, made),
        "training": _training(results, made),
        "recipes": recipes,
        "dtype": results.get("dtype") or "float32",
        "limits": _limits(results, made, evaluations),
        "files": results["sha256"],
        "licence": _line(results.get("licence") or "Not stated").rstrip(".") + ".",
        "citation": _ADVCL if is_advcl(results, made) else None,
    }
    text = ModelCard.from_template(data, template_str=_TEMPLATE.read_text(encoding="utf-8"), **fields).content
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def summary(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What an export is, in one sentence, from its results.json and config.json."""
    architecture, made = config["architecture"], pretraining(results)
    if made:
        origin = f"pretrained with {method(made)} on {made['provenance']['data']['name']} without its labels"
    elif results.get("origin"):
        origin = f"converted from {_line(results['origin'])}"
    else:
        origin = f"of {(results.get('encoder') or {}).get('name', 'unknown origin')}"
    stages = finetunings(results)
    for stage in reversed(stages if is_lp_aff(results) else stages[1:]):
        origin += f", then {_finetuned(stage)}"
    if not config.get("num_classes"):
        return f"`{architecture}` image encoder for [timm](https://github.com/huggingface/pytorch-image-models), {origin}" + (
            ", so that classifiers finetuned from it keep adversarial robustness." if made and is_robust(made) else "."
        )
    protocol = (results.get("settings") or {}).get("protocol")
    how = f": {PROTOCOLS[protocol]}, " if protocol in PROTOCOLS else ", "
    data = (results.get("data") or {}).get("name")
    of = f" of {data}" if data else ""
    return (
        f"`{architecture}` classifier{of} for [timm](https://github.com/huggingface/pytorch-image-models){how}"
        f"{'the encoder ' if protocol else ''}{origin}."
    )


def _finetuned(stage: Mapping[str, Any]) -> str:
    """A finetuning on the way to some weights, in a few words."""
    if is_lp_aff(stage):
        return f"finetuned on clusters of {_line(stage['images']['name'])} (LP-AFF)"
    return f"finetuned with labels of {_line(stage['data']['name'])} ({stage['settings']['protocol'].upper()})"


def _projector(results: Mapping[str, Any]) -> str | None:
    """What the projection head is, if there is one."""
    head = results.get("projector")
    return head and f"{', '.join(map(_line, head['layers']))}; widths {', '.join(f'{width:d}' for width in head['widths'])}"


def _training(results: Mapping[str, Any], made: Mapping[str, Any] | None) -> dict[str, str]:
    """What is known of how the weights were made, by name."""
    lines: dict[str, str] = {}
    if made:
        place, data, labels = made["provenance"], made["provenance"]["data"], made["provenance"].get("pseudo_labels")
        _, *before = pretrainings(made)
        teacher = before[0] if before else None
        lines["Pretraining"] = f"{_schedule(made)}, {counted(made['step'], 'step')}"
        if not made.get("finished", True):
            lines["Pretraining"] += ", stopped before the end of the schedule"
        if before:
            lines["Pretraining"] += f"; before that, {'; '.join(map(_schedule, before))}"
        lines["Pretraining images"] = f"{data['images']:,} of {data['name']} (sha256 of the pixels `{data['sha256'][:16]}`)"
        lines["Pseudo-labels"] = _pseudo_labels(labels)
        if start := started_from(made):
            took = f", {teacher['seconds']:,.0f} s" if teacher and teacher.get("seconds") else ""
            how = f", {_schedule(teacher)}{took}" if teacher else ""
            lines["Started from"] = f"{_line(start['name'])}{how} (weights sha256 `{start['weights_sha256'][:16]}`)"
        lines["Branch"] = f"batch norm `{made['branch']}`" + (", averaged weights" if made.get("ema") else "")
        lines["Pretraining took"] = f"{made['seconds']:,.0f} s on {_device(place)}"
        if before:
            total = sum(stage.get("seconds") or 0 for stage in (made, *before))
            lines["Pretraining took"] += f"; with what it started from {total:,.0f} s"
        lines["Pretraining versions"] = _listed(place["versions"])
    if stages := finetunings(results)[1:]:
        phrases = [f"{_finetuned(stage)}, {counted(stage['settings']['epochs'], 'epoch')}" for stage in reversed(stages)]
        lines["Finetuned before"] = "; ".join(phrases)
    if settings := results.get("settings"):
        data, place = results["data"], results["places"][-1]
        shots = f", {data['shots']} of every class" if data.get("shots") else ""
        decay = ", ".join(f"{m:g}" for m in settings["milestones"])
        lines["Finetuning"] = (
            f"{PROTOCOLS[settings['protocol']]}, loss {settings['objective']}, {counted(settings['epochs'], 'epoch')}, batch "
            f"{settings['batch_size']}, lr {settings['lr']:g}, divided by 10 after epochs {decay}, weight decay "
            f"{settings['weight_decay']:g}; {results['chosen']}; seed {settings['seed']}"
        )
        if settings["objective"] != "ce":
            lines["Attack in finetuning"] = (
                f"l_inf, eps {pixels(settings['eps'])}, {counted(settings['steps'], 'step')} of {pixels(settings['step_size'])}"
            )
        lines["Finetuning images"] = f"{data['images']:,} of {data['of']:,}, {data['name']} {data['split'] or ''}{shots}"
        if command := results.get("command"):
            lines["Finetuning command"] = f"`{command}`"
        lines["Finetuning took"] = f"{results['seconds']:,.0f} s on {place['hardware']['name']}"
        lines["Finetuning versions"] = _listed(place["versions"])
    if not lines:
        lines["Origin"] = _line(results.get("origin") or "not recorded")
    if layout := results.get("layout"):
        lines["Converted from"] = f"{results.get('file', 'a file')}, layout {layout}"
    lines["Stored as"] = str(results.get("dtype"))
    return lines


def _recipes(made: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Title and text of the recipe of every pretraining run behind some weights, the latest first."""
    stages = pretrainings(made)
    titles = ["The recipe, with all its values", *["The recipe of what it started from"] * len(stages)]
    return [(title, json.dumps(stage["recipe"], indent=2)) for title, stage in zip(titles, stages, strict=False)]


def _pseudo_labels(labels: Mapping[str, Any] | None) -> str:
    if not labels:
        return "none"
    facts = {key: value for key, value in labels.items() if key not in ("sha256", "file_sha256", "file", "device", "versions")}
    file = f"{labels['file']}, " if labels.get("file") else ""
    of_file = f"sha256 of the file `{labels['file_sha256'][:16]}`, " if labels.get("file_sha256") else ""
    return f"{file}{_listed(facts)}{'; ' if facts else ''}{of_file}sha256 of the labels `{labels['sha256'][:16]}`"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _threat(evaluations: Sequence[Mapping[str, Any]], results: Mapping[str, Any], made: Mapping[str, Any] | None) -> str:
    parts = []
    if made and is_robust(made):
        attacks = [stage["recipe"]["attack"] for stage in pretrainings(made) if is_robust(stage)]
        lengths = dict.fromkeys(
            f"l_inf {pixels(a['eps'])} ({counted(a['steps'], 'step')} of {pixels(a['step_size'])})" for a in attacks
        )
        parts.append(f"Pretraining made adversarial views within {', before that within '.join(lengths)}.")
    attacked = [e["protocol"] for e in evaluations if {"pgd", "autoattack"} & e["accuracy"].keys()]
    budgets = dict.fromkeys(f"{p['norm']} {pixels(p['eps'], p['norm'])}" for p in attacked)
    if budgets:
        parts.append(f"Measured against an attacker who knows the model and may change every pixel: {', '.join(budgets)}.")
    parts.append("Distances are those of pixels in [0, 1]. Nothing is said about other norms, larger distances or patches.")
    return " ".join(parts)


def _corruptions(evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    found = [f"{e['model']['name']} {100 * e['corruptions']['mean']:.1f} %" for e in evaluations if "corruptions" in e]
    return f"mean accuracy of {'; '.join(found)} (a small set of our own, not CIFAR-10-C)." if found else None


def _checks(evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    checks = [check for e in evaluations for check in e["checks"]]
    if not checks:
        return None
    failed = sum(not check["passed"] for check in checks)
    result = f"{len(checks) - failed} of {len(checks)} passed" + ("; the warnings above say which did not" if failed else "")
    unchecked = [e["model"]["name"] for e in evaluations if not e["checks"]]
    return f"{result}; not run on {', '.join(map(_line, unchecked))}." if unchecked else f"{result}."


def _caption(model: str | None) -> str:
    shown = "Images, perturbations that PGD found, and the perturbed images with predictions: the most confident mistakes"
    return f"{shown} of {_line(model)}." if model else f"{shown}."


def _line(text: object) -> str:
    """What somebody typed, or a file has in its place, as one line; see `in_markdown`."""
    return in_markdown(str(text))


def _escaped(record: Any) -> Any:
    """A record with every text in it, names included, as one line; see `in_markdown`."""
    if isinstance(record, Mapping):
        return {_escaped(key): _escaped(value) for key, value in record.items()}
    if isinstance(record, list):
        return [_escaped(value) for value in record]
    return in_markdown(record) if isinstance(record, str) else record


def _schedule(made: Mapping[str, Any]) -> str:
    """A pretraining by its method and length."""
    return f"{method(made)}, {counted(made['recipe']['epochs'], 'epoch')}"


def _device(place: Mapping[str, Any]) -> str:
    """The device of a pretraining; its record, which runs are compared by, has `1 threads`."""
    return re.sub(r"\b1 threads\b", "1 thread", place["hardware"]["device"])


def _origin_of_labels(labels: Mapping[str, Any]) -> str | None:
    """What the pseudo-labels of a pretraining may have brought in; None if it is known that they brought in nothing."""
    if labels.get("file_sha256") == _PUBLISHED_LABELS:
        return (
            "The pseudo-labels are those that the authors of AdvCL published, read from a safetensors file of our own that is "
            "not in the repository: without that file these weights cannot be made again. They come from an encoder trained on "
            "ImageNet images: this is not learning from scratch."
        )
    if "imagenet" in json.dumps(labels).lower():
        return "The pseudo-labels come from an encoder trained on ImageNet images: this is not learning from scratch."
    encoder = labels.get("encoder")
    if not encoder or encoder in {"pixels", *(release.name for release in load_releases() if _saw_no_labels(release))}:
        return None
    return f"The pseudo-labels are clusters of the features of {_line(encoder)}, which may have seen labels or other images."


def _saw_no_labels(release: Release) -> bool:
    """Whether a release is an encoder made without labels of any kind, and from nothing else."""
    made = release.facts.get("provenance") or {}
    return release.facts.get("head") == "none" and bool(made) and not made.get("pseudo_labels") and not made.get("start_from")


def _limits(results: Mapping[str, Any], made: Mapping[str, Any] | None, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    attacked = any({"pgd", "autoattack"} & evaluation["accuracy"].keys() for evaluation in evaluations)
    robustness = "was measured, not proven: stronger attacks may find more" if attacked else "has not been measured"
    limits = [
        f"For research on robust representations. Robustness {robustness}.",
        "Not for decisions about people, nor as the only protection of anything.",
    ]
    of_labels = (_origin_of_labels((stage.get("provenance") or {}).get("pseudo_labels") or {}) for stage in pretrainings(made))
    limits += dict.fromkeys(filter(None, of_labels))
    if labelled := [_finetuned(stage) for stage in reversed(finetunings(results)[1:]) if not is_lp_aff(stage)]:
        limits.append(f"Labels came in before this finetuning, too: the encoder had been {'; '.join(labelled)}.")
    start = started_from(made or {})
    if made and start and len(pretrainings(made)) == 1:
        limits.append(
            f"Nothing says how {_line(start['name'])} was made, from which the pretraining started: it may have seen labels or "
            "other images."
        )
    if made and not made.get("finished", True):
        limits.append("The pretraining was stopped before the end of its schedule.")
    return limits + [_line(note) for note in results.get("notes", [])]
