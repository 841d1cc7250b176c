"""C++ for this very machine, compiled when a benchmark starts."""

import ctypes
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def compile_library(source: Path) -> ctypes.CDLL:
    """The shared library of one source file.

    It is not linked with OpenMP: the symbols bind to the runtime that torch has loaded, so that all share its threads.
    """
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        built, library = f"{folder}/library.o", f"{folder}/library.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp"]
        subprocess.run([compiler, *flags, "-c", str(source), "-o", built], check=True)
        subprocess.run([compiler, "-shared", built, "-o", library], check=True)
        return ctypes.CDLL(library)
