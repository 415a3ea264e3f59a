"""Adapters after training, saved, loaded, merged and exported; and completions of the model that is being trained."""

from ..model.trainer import teach_trainer
from .adapters import load_adapter
from .export import export
from .merge import MergeReport, merge_lora
from .rollouts import Rollouts

teach_trainer(load_adapter)
