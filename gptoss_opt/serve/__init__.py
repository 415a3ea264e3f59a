"""Serving a model to many at once: pages of keys, a scheduler, packed steps, and requests that stream."""

from .batcher import ContinuousBatcher
from .prompts import TooLongError
from .request import GenerationError, Request
from .sampler import Logprobs
from .stats import Stats
from .text import SettledText, StopStrings, pieces
