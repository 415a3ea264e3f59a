"""Serving a model to many at once: pages of keys, a scheduler, packed steps, and requests that stream."""

from .batcher import ContinuousBatcher
from .request import GenerationError, Logprobs, Request
from .stats import Stats
