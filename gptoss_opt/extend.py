"""What wrappers of your own are made of: see docs/writing_a_wrapper.md.

Example:
    >>> from gptoss_opt import extend
    >>> [phase.name for phase in extend.Phase]
    ['LAYOUT', 'COMPUTE', 'ADAPT', 'LOSS', 'PARALLEL', 'OBSERVE']
"""

from .core import (
    Attachment,
    Backend,
    Choice,
    Host,
    Journal,
    Phase,
    Report,
    Wrapper,
    check_name,
    choose,
    held_by,
    layout_of,
    mesh_of,
)
from .kernels.mxfp4 import sqnr
from .layout import STORAGES, Axis, Form, Layout, LayoutError, Split, Storage, Stored
from .model.host import GPT_OSS

__all__ = [
    "GPT_OSS",
    "STORAGES",
    "Attachment",
    "Axis",
    "Backend",
    "Choice",
    "Form",
    "Host",
    "Journal",
    "Layout",
    "LayoutError",
    "Phase",
    "Report",
    "Split",
    "Storage",
    "Stored",
    "Wrapper",
    "check_name",
    "choose",
    "held_by",
    "layout_of",
    "mesh_of",
    "sqnr",
]
