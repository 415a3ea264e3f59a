"""Whether a wrapped model computes what plain eager computations of its weights do, part by part."""

from .drift import Drift
from .report import Verification
from .verify import verify
