"""Adapters after training: off for a while, saved, loaded, merged, and exported as a checkpoint that others load."""

from ..model.trainer import teach_trainer
from .adapters import load_adapter
from .export import export
from .merge import MergeReport, merge_lora

teach_trainer(load_adapter)
