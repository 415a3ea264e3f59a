"""The one part of the build that pyproject.toml cannot say: an optional library in C, loaded with ctypes."""

import sys

from setuptools import Extension, setup

NATIVE = Extension(
    "gptoss_opt.kernels.experts._native",
    ["gptoss_opt/kernels/experts/native.c"],
    extra_compile_args=["-O3"],
    libraries=["m", "pthread"],
    # Without a compiler the package installs all the same, and does without.
    optional=True,
)

# The source is for gcc and clang.
setup(ext_modules=[] if sys.platform == "win32" else [NATIVE])
