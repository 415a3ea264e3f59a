"""The command line: `python -m gptoss_opt`, and `gptoss-opt` once installed."""

from .app import main
