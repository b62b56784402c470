"""What the Hub reads of a card: library, licence, tags, data sets, and figures with attack, norm, eps and number of images."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from advcl_hub.hub.cards.provenance import is_robust, method_name
from advcl_hub.records import autoattack_text, pixels

_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
}


def metadata(
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
    # Figures in bfloat16 are for screening only: the table warns of them, the Hub would not.
    exact = [evaluation for evaluation in evaluations if evaluation["protocol"]["precision"] == "float32"]
    measured = [result for evaluation in exact for result in _eval_results(evaluation)]
    return ModelCardData(
        library_name="timm",
        license=results.get("licence"),
        pipeline_tag="image-classification" if classifier else "image-feature-extraction",
        tags=["timm", "advcl-hub", *_topics(results, made), config["architecture"]],
        datasets=datasets or None,
        model_name=title,
        eval_results=measured or None,  # the client refuses an empty list
    )


def _topics(results: Mapping[str, Any], made: Mapping[str, Any] | None) -> list[str]:
    """Tags of the Hub: what is known of how the weights were made."""
    contrastive = method_name(made) in ("advcl", "simclr", "acl") if made else results.get("layout") in ("advcl", "acl")
    adversarial = (results.get("settings") or {}).get("objective") in ("pgd", "trades")
    robust = adversarial or results.get("layout") in ("advcl", "acl") or (made is not None and is_robust(made))
    return ["adversarial-robustness"] * robust + ["contrastive-learning"] * contrastive


def _dataset(name: str) -> str:
    return name.removeprefix("parquet:")


def _told(name: str) -> str:
    """A data set for people: a leaderboard must not take copies for the original."""
    return f"{_dataset(name)} (copies in Parquet files, which may be recompressed)" if _dataset(name) != name else name


def _eval_results(evaluation: Mapping[str, Any]) -> list[EvalResult]:
    data, protocol = evaluation["data"], evaluation["protocol"]
    steps = f"PGD-{protocol['steps']}"
    attacked = f"AutoAttack {autoattack_text(evaluation)}" if protocol["autoattack"] else ""
    names = {"standard": "standard accuracy", "pgd": f"accuracy under {steps}", "autoattack": "accuracy under AutoAttack"}
    attacks = {"standard": "none", "pgd": steps, "autoattack": attacked}
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
                    dataset_name=_told(data["name"]),
                    dataset_split=data["split"],
                    metric_type="accuracy",
                    metric_name=f"{name} (%)",
                    metric_value=round(100 * evaluation["accuracy"][key]["value"], 2),
                    metric_args={"attack": attacks[key], **extra, **shared},
                )
            )
    return found
