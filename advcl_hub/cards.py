"""Model cards from results.json: what the weights are, how they were made, what was measured, and how far that goes.

A card is made anew whenever it is needed; nothing in it is typed by hand but the notes that results.json keeps.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from advcl_hub.evaluation import load_record, report
from advcl_hub.evaluation.protocol import pixels
from advcl_hub.export import CARD, CONFIG, PICTURE, RESULTS, WEIGHTS
from advcl_hub.files import replacing, without_local_paths

_TEMPLATE = Path(__file__).with_name("card.md")
LICENCE = "apache-2.0"
_DATASETS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "fashion-mnist": "zalando-datasets/fashion_mnist"}
_PROTOCOLS = {
    "slf": "linear head on the frozen encoder (SLF)",
    "alf": "adversarially trained linear head on the frozen encoder (ALF)",
    "aff": "adversarial full finetuning (AFF)",
    "sff": "standard full finetuning (SFF)",
}
# Of an evaluation's record, what no card shows: every class and step, and how the model was made, which stands beside it.
_LEFT_OUT = ("per_class", "curves", "classes", "corrupted")
_ADVCL = """@inproceedings{fan2021advcl,
  title     = {When Does Contrastive Learning Preserve Adversarial Robustness from Pretraining to Finetuning?},
  author    = {Fan, Lijie and Liu, Sijia and Chen, Pin-Yu and Zhang, Gaoyuan and Gan, Chuang},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021},
  eprint    = {2111.01124},
  archiveprefix = {arXiv}
}"""


def read_export(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """results.json, without local paths that an older export may have, and config.json of an exported folder.

    Raises:
        FileNotFoundError: it has none: no exported folder.
        ValueError: one of them is damaged.
    """
    folder, found = Path(folder), []
    for name in (RESULTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: not a folder that advcl-hub exported.")
        try:
            found.append(without_local_paths(json.loads((folder / name).read_text())))
        except ValueError as error:
            raise ValueError(f"{folder / name} is damaged ({error}): export or pull it again.") from None
    if not all(isinstance(record, dict) for record in found) or not isinstance(found[0].get("sha256"), dict):
        raise ValueError(f"{folder / RESULTS} names no sha256 of the weights: not a folder that advcl-hub exported.")
    return found[0], found[1]


def add_to_results(folder: str | Path, evaluations: Sequence[str | Path] = (), notes: Sequence[str] = ()) -> dict[str, Any]:
    """Adds evaluations and notes to an export's results.json, for its card, and takes the picture of the last evaluation.

    Args:
        folder: that `advcl_hub.export` wrote.
        evaluations: folders that `advcl-hub evaluate` wrote, of these very weights, or of a classifier that was finetuned from
            them. An earlier one of the same model, data and attacks is replaced.
        notes: sentences for the card's section on limits; those that stand there already are not repeated.

    Returns:
        results.json as it is now.

    Raises:
        ValueError: an evaluation of other weights.
        OSError: a folder or file is missing, or cannot be written.
    """
    folder = Path(folder)
    results, _ = read_export(folder)
    added = [_compact(load_record(Path(path)), results, path) for path in evaluations]
    standing = [e for e in results.get("evaluations", []) if _identity(e) not in map(_identity, added)]
    results["evaluations"] = standing + added
    results["notes"] = list(dict.fromkeys([*results.get("notes", []), *notes]))
    with replacing(folder / RESULTS) as draft:
        draft.write_text(json.dumps(results, indent=2) + "\n")
    pictures = [Path(path) / PICTURE for path in evaluations if (Path(path) / PICTURE).is_file()]
    if pictures:
        with replacing(folder / PICTURE) as draft:
            shutil.copyfile(pictures[-1], draft)
    return results


def write_card(folder: str | Path, name: str | None = None, load: str | None = None) -> Path:
    """Writes an export's card, README.md, from what stands in the folder; see `card`."""
    path = Path(folder) / CARD
    text = card(folder, name, load)
    with replacing(path) as draft:
        draft.write_text(text)
    return path


def card(folder: str | Path, name: str | None = None, load: str | None = None) -> str:
    """The model card of an exported folder, with the metadata that the Hub reads.

    Args:
        folder: that `advcl_hub.export` wrote.
        name: title, by default the folder's name.
        load: what `timm.create_model` opens, by default the folder.

    Raises:
        ValueError, OSError: see `read_export`; or what results.json says is not what `advcl_hub` writes.
    """
    folder = Path(folder)
    results, config = read_export(folder)
    try:
        return _render(folder, results, config, name or folder.absolute().name, load or f"local-dir:{folder}")
    except (KeyError, TypeError, AttributeError, IndexError) as error:  # of others' files
        raise ValueError(f"{folder / RESULTS} cannot be made a card of ({error!r}): export or pull it again.") from error


def _render(folder: Path, results: Mapping[str, Any], config: Mapping[str, Any], title: str, load: str) -> str:
    cfg, classes = config.get("pretrained_cfg", {}), tuple(config.get("label_names") or ())
    if not classes and config.get("num_classes"):
        classes = tuple(str(i) for i in range(config["num_classes"]))
    evaluations = results.get("evaluations", [])
    mean, std = cfg.get("mean", [0.0]), cfg.get("std", [1.0])
    plain = not any(mean) and all(value == 1 for value in std)
    made = pretraining(results)
    fields = {
        "name": title,
        "load": load,
        "summary": summary(results, config),
        "classes": classes,
        "features": config.get("num_features"),
        "size": "x".join(map(str, cfg.get("input_size", ())[1:])),
        "normalisation": "without normalisation" if plain else f"normalised with mean {mean} and standard deviation {std}",
        "table": report(evaluations, "markdown") if evaluations else None,
        "corruptions": _corruptions(evaluations),
        "checks": _checks(evaluations),
        "commands": [
            f"`{e['command']}`, {e['seconds']:,.0f} s on {e['hardware']['name']}" for e in evaluations if e["command"]
        ],
        "picture": PICTURE if (folder / PICTURE).is_file() else None,
        "caption": _caption(evaluations),
        "threat": _threat(evaluations, results, made),
        "training": _training(results, made),
        "recipe": json.dumps(made["recipe"], indent=2) if made else None,
        "limits": _limits(results, made),
        "files": results["sha256"],
        "licence": "Apache-2.0. The images that the weights were made from have terms of their own.",
        "citation": _ADVCL,
    }
    metadata = _metadata(title, results, config, evaluations, made)
    text = ModelCard.from_template(metadata, template_str=_TEMPLATE.read_text(), **fields).content
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _compact(record: dict[str, Any], results: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What a card needs of an evaluation's record; ValueError if it is of other weights than the export's."""
    ours, model = results["sha256"][WEIGHTS], record["model"]
    tuned = model.get("provenance") or {}
    if model.get("file_sha256") == ours:
        name = "this model"
    elif ours in _ancestors(tuned) and tuned.get("settings"):
        name = _PROTOCOLS[tuned["settings"]["protocol"]]
    else:
        raise ValueError(f"{path} is an evaluation of {model['name']}, which is neither these weights nor finetuned from them.")
    kept = {key: value for key, value in record.items() if key not in _LEFT_OUT}
    kept["model"] = {key: value for key, value in model.items() if key != "provenance"} | {"name": name}
    if name != "this model":
        kept["finetuning"] = {key: tuned.get(key) for key in ("settings", "data", "seconds", "command")}
    return without_local_paths(kept)


def _ancestors(tuned: Mapping[str, Any]) -> set[str]:
    """sha256 of the weights that a finetuned classifier comes from."""
    found: set[Any] = set()
    record = (tuned.get("encoder") or {}).get("provenance")
    while record:
        found |= {(record.get("sha256") or {}).get(WEIGHTS), (record.get("rounded_from") or {}).get("sha256")}
        record = (record.get("encoder") or {}).get("provenance")
    return found - {None}


def _identity(record: Mapping[str, Any]) -> str:
    keys = ("name", "attacked_at")
    same = [{k: record["model"].get(k) for k in keys}, record["data"], record["protocol"]]
    return json.dumps(same, sort_keys=True)


def pretraining(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record of the pretraining run behind an encoder or a classifier, None if it is not known."""
    record: Any = results
    while isinstance(record, Mapping):
        if "recipe" in record:
            return record
        record = (record.get("encoder") or {}).get("provenance")
    return None


def _is_robust(made: Mapping[str, Any]) -> bool:
    return bool(made["recipe"].get("attack", {}).get("steps"))


def _method(recipe: Mapping[str, Any]) -> str:
    if not recipe.get("attack", {}).get("steps"):
        return "contrastive learning on clean views"
    return (
        "AdvCL"
        if recipe.get("objective", {}).get("pseudo_label_weight")
        else "adversarial contrastive learning without pseudo-labels"
    )


def summary(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What an export is, in one sentence, from its results.json and config.json."""
    architecture, made = config["architecture"], pretraining(results)
    if made:
        origin = f"pretrained with {_method(made['recipe'])} on {made['provenance']['data']['name']} without its labels"
    elif results.get("origin"):
        origin = f"converted from {results['origin']}"
    else:
        origin = f"of {(results.get('encoder') or {}).get('name', 'unknown origin')}"
    if not config.get("num_classes"):
        return f"`{architecture}` image encoder for [timm](https://github.com/huggingface/pytorch-image-models), {origin}" + (
            ", so that classifiers finetuned from it keep adversarial robustness." if made and _is_robust(made) else "."
        )
    protocol = (results.get("settings") or {}).get("protocol")
    how = f": {_PROTOCOLS[protocol]}, " if protocol in _PROTOCOLS else ", "
    data = (results.get("data") or {}).get("name")
    of = f" of {data}" if data else ""
    return (
        f"`{architecture}` classifier{of} for [timm](https://github.com/huggingface/pytorch-image-models){how}"
        f"{'the encoder ' if protocol else ''}{origin}."
    )


def _training(results: Mapping[str, Any], made: Mapping[str, Any] | None) -> dict[str, str]:
    """What is known of how the weights were made, by name."""
    lines: dict[str, str] = {}
    if made:
        place, data, labels = made["provenance"], made["provenance"]["data"], made["provenance"].get("pseudo_labels")
        lines["Pretraining"] = f"{_method(made['recipe'])}, {made['recipe']['epochs']} epochs, {made['step']:,} steps"
        if not made.get("finished", True):
            lines["Pretraining"] += ", stopped before the end of the schedule"
        lines["Pretraining images"] = f"{data['images']:,} of {data['name']} (sha256 of the pixels `{data['sha256'][:16]}`)"
        lines["Pseudo-labels"] = _pseudo_labels(labels)
        lines["Branch"] = f"batch norm `{made['branch']}`" + (", averaged weights" if made.get("ema") else "")
        lines["Pretraining took"] = f"{made['seconds']:,.0f} s on {place['hardware']['device']}"
        lines["Pretraining versions"] = _listed(place["versions"])
    if settings := results.get("settings"):
        data, place = results["data"], results["places"][-1]
        shots = f", {data['shots']} of every class" if data.get("shots") else ""
        decay = ", ".join(f"{m:g}" for m in settings["milestones"])
        lines["Finetuning"] = (
            f"{_PROTOCOLS[settings['protocol']]}, loss {settings['objective']}, {settings['epochs']} epochs, batch "
            f"{settings['batch_size']}, lr {settings['lr']:g}, divided by 10 after {decay}; {results['chosen']}; seed "
            f"{settings['seed']}"
        )
        if settings["objective"] != "ce":
            lines["Attack in finetuning"] = (
                f"l_inf, eps {pixels(settings['eps'])}, {settings['steps']} steps of {pixels(settings['step_size'])}"
            )
        lines["Finetuning images"] = f"{data['images']:,} of {data['of']:,}, {data['name']} {data['split'] or ''}{shots}"
        if command := results.get("command"):
            lines["Finetuning command"] = f"`{command}`"
        lines["Finetuning took"] = f"{results['seconds']:,.0f} s on {place['hardware']['name']}"
        lines["Finetuning versions"] = _listed(place["versions"])
    if not lines:
        lines["Origin"] = str(results.get("origin") or "not recorded")
    if layout := results.get("layout"):
        lines["Converted from"] = f"{results.get('file', 'a file')}, layout {layout}"
    lines["Stored as"] = str(results.get("dtype"))
    return lines


def _pseudo_labels(labels: Mapping[str, Any] | None) -> str:
    if not labels:
        return "none"
    told = {key: value for key, value in labels.items() if key not in ("sha256", "file_sha256", "file", "device", "versions")}
    file = f"{labels['file']}, " if labels.get("file") else ""
    return f"{file}{_listed(told)}{'; ' if told else ''}sha256 `{labels['sha256'][:16]}`"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _threat(evaluations: Sequence[Mapping[str, Any]], results: Mapping[str, Any], made: Mapping[str, Any] | None) -> str:
    attack = (made or {}).get("recipe", {}).get("attack") or {}
    parts = []
    if attack.get("steps"):
        parts.append(
            f"Pretraining made adversarial views within l_inf {pixels(attack['eps'])} ({attack['steps']} steps of "
            f"{pixels(attack['step_size'])})."
        )
    budgets = dict.fromkeys(
        f"{e['protocol']['norm']} {pixels(e['protocol']['eps'], e['protocol']['norm'])}" for e in evaluations
    )
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
    return f"{len(checks) - failed} of {len(checks)} passed" + ("; the warnings above say which did not." if failed else ".")


def _caption(evaluations: Sequence[Mapping[str, Any]]) -> str:
    shown = "Images, perturbations that PGD found, and the perturbed images with the model's predictions"
    return f"{shown}: the most confident mistakes ({evaluations[-1]['model']['name']})." if evaluations else f"{shown}."


def _limits(results: Mapping[str, Any], made: Mapping[str, Any] | None) -> list[str]:
    limits = [
        "For research on robust representations. Robustness was measured, not proven: stronger attacks may find more.",
        "Not for decisions about people, nor as the only protection of anything.",
    ]
    labels = ((made or {}).get("provenance") or {}).get("pseudo_labels") or {}
    if "imagenet" in json.dumps(labels).lower():
        limits.append("The pseudo-labels come from an encoder trained on ImageNet images: this is not learning from scratch.")
    if made and not made.get("finished", True):
        limits.append("The pretraining was stopped before the end of its schedule.")
    return limits + list(results.get("notes", []))


def _metadata(
    title: str,
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    made: Mapping[str, Any] | None,
) -> ModelCardData:
    used = [made["provenance"]["data"]["name"]] if made else []
    used += [results["data"]["name"]] if isinstance(results.get("data"), Mapping) else []
    datasets = [_DATASETS[name] for name in dict.fromkeys(map(_dataset, used)) if name in _DATASETS]
    classifier = bool(config.get("num_classes"))
    measured = [result for evaluation in evaluations for result in _eval_results(evaluation)]
    return ModelCardData(
        library_name="timm",
        license=LICENCE,
        pipeline_tag="image-classification" if classifier else "image-feature-extraction",
        tags=["timm", "advcl-hub", "adversarial-robustness", "contrastive-learning", config["architecture"]],
        datasets=datasets or None,
        model_name=title,
        eval_results=measured or None,  # the client refuses an empty list
    )


def _dataset(name: str) -> str:
    return name.removeprefix("parquet:")


def _eval_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    data, protocol = evaluation["data"], evaluation["protocol"]
    steps = f"PGD-{protocol['steps']}"
    names = {"standard": "standard accuracy", "pgd": f"accuracy under {steps}", "autoattack": "accuracy under AutoAttack"}
    attacks = {"standard": "none", "pgd": steps, "autoattack": f"AutoAttack {protocol['autoattack']}"}
    shared = {"model": evaluation["model"]["name"], "images": data["images"], "seed": protocol["seed"]}
    budget = {"norm": protocol["norm"], "eps": pixels(protocol["eps"], protocol["norm"])}
    found = []
    for key, name in names.items():
        if key in evaluation["accuracy"]:
            extra = {} if key == "standard" else budget
            found.append(
                EvalResult(
                    task_type="image-classification",
                    dataset_type=_DATASETS.get(_dataset(data["name"]), data["name"]),
                    dataset_name=data["name"],
                    dataset_split=data["split"],
                    metric_type="accuracy",
                    metric_name=f"{name} (%)",
                    metric_value=round(100 * evaluation["accuracy"][key]["value"], 2),
                    metric_args={"attack": attacks[key], **extra, **shared},
                )
            )
    return found
