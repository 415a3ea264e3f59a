"""What a model does while it runs: where its time goes, what it holds, how its experts are used."""

from . import optimizers
from .monitor import Monitor
from .step import Step
