"""What a model needs and what a machine has: the ground on which a plan is made."""

from .hardware import Device, Hardware, HardwareError, described, detected
