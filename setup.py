"""The one part of the build that pyproject.toml cannot say: an optional library in C, loaded with ctypes."""

import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("gptoss_opt/kernels/native/c")
NATIVE = Extension(
    "gptoss_opt.kernels.native._native",
    [str(SOURCES / "native.c")],
    depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
    extra_compile_args=["-O3"],
    libraries=["m", "pthread"],
    # Without a compiler the package installs all the same, and does without.
    optional=True,
)

# The source is for gcc and clang.
setup(ext_modules=[] if sys.platform == "win32" else [NATIVE])
