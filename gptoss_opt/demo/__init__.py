"""The demo: GPT-OSS as transformers runs it and with the wrappers, measured and compared.

`tables.py` says what is compared: generation and a training step over long prompts, decoding with the experts held in
each way, the model sharded over several processes (if they are asked for), several prompts at once, and fine-tuning.
Models are measured in processes of their own, so that the memory of each is its own, and timed once, after a short
warm-up.
"""

from .isolate import DemoError
from .run import run_demo

__all__ = ["DemoError", "run_demo"]
