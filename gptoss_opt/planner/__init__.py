"""Plans: the wrappers for a model, a machine and a task, with what they take and how fast they are."""

from .hardware import Device, Hardware, HardwareError, described, detected
from .optimize import PlanError, optimize
from .plan import Plan, plan
from .target import RELEASED_AT
