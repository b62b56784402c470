"""Accuracy on clean, adversarial and corrupted images, with everything needed to repeat it and signs that speak against it."""

from advcl_hub.evaluation.classifier import PixelSpace
from advcl_hub.evaluation.opening import load_model
from advcl_hub.evaluation.protocol import Protocol, pixels
from advcl_hub.evaluation.quick import Robustness, robustness
from advcl_hub.evaluation.results import Evaluation, load_record
from advcl_hub.evaluation.runner import evaluate
from advcl_hub.evaluation.tables import report

__all__ = [
    "Evaluation",
    "PixelSpace",
    "Protocol",
    "Robustness",
    "evaluate",
    "load_model",
    "load_record",
    "pixels",
    "report",
    "robustness",
]
