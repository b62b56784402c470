"""Accuracy on clean, adversarial and corrupted images, all that is needed to repeat it, and warnings of false robustness."""

from advcl_hub.evaluation.protocol import Protocol
from advcl_hub.evaluation.quick import Robustness, adversarial_images, robustness
from advcl_hub.evaluation.results import Evaluation
from advcl_hub.evaluation.runner import evaluate

__all__ = ["Evaluation", "Protocol", "Robustness", "adversarial_images", "evaluate", "robustness"]
