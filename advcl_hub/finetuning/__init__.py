"""Finetuning an encoder on a labelled data set under a named protocol: SLF, ALF, AFF, SFF."""

from advcl_hub.finetuning.lp_aff import lp_aff
from advcl_hub.finetuning.presets import PRESETS, PROTOCOLS, Settings
from advcl_hub.finetuning.runner import Finetuned, finetune
from advcl_hub.finetuning.transfer import transfer

__all__ = ["PRESETS", "PROTOCOLS", "Finetuned", "Settings", "finetune", "lp_aff", "transfer"]
