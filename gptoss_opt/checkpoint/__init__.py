"""Checkpoints in the released format: found, read, loaded with wrappers, and written again."""

from .adapter import save_adapter
from .folder import Checkpoint
from .load import load
from .reader import CheckpointError, TensorInfo
from .save import gather_state_dict, save_pretrained
