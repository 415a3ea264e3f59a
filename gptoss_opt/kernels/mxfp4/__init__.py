"""MXFP4: four-bit floats in blocks of 32 that share a power-of-two scale, as in the released GPT-OSS checkpoints."""

from .convert import pack, pack_columns, unpack
from .format import BLOCK, FP4_VALUES, sqnr
