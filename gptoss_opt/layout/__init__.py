"""How every parameter of a model is stored and split over ranks: as data, and the one executor that moves the bytes."""

from .check import check, check_movable
from .holders import under_fsdp, under_zero
from .layout import Axis, Form, Layout, LayoutError, New, require
from .mxfp4 import MXFP4
from .relayout import Held, Mesh, Source, dense_layout, exchange, relayout
from .storage import DENSE, STORAGES, Part, Sliced, Split, Storage, Stored, take
