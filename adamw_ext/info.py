"""What this build is: the facts that belong into a bug report."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from adamw_ext import _C

__version__ = metadata.version("adamw_ext")

_FOLDER = Path(__file__).parent


def build_info() -> dict[str, Any]:
    """Facts about this build and the machine it runs on, by name.

    ``cuda architectures`` are those the CUDA kernels, if there are any, were compiled for (sm_: machine code, compute_:
    PTX for later ones). ``isa_levels`` are the instruction sets that this binary holds loops for and this processor
    can run, ``isa`` the one that a new optimizer takes (``ADAMW_EXT_ISA`` forces it), ``threads`` the most that a step
    uses.
    """
    return {
        "adamw_ext": __version__,
        "torch": torch.__version__,
        "built with torch": _C.built_with_torch,
        "compiler": _C.compiler,
        "cuda kernels": _C.cuda_kernels,
        "cuda architectures": _C.cuda_architectures,
        "isa_levels": _C.isa_levels(),
        "isa": _C.chosen_isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()} {''.join(platform.libc_ver())}",
    }


def library_path() -> str:
    """The shared library with the kernels, the operators and the C++ and TorchScript class ``adamw_ext::AdamW``.

    It needs libtorch and no Python. A C++ program links it, or loads it with ``dlopen``, before it loads a TorchScript
    module that holds the optimizer.
    """
    return str(_FOLDER / "libadamw_ext.so")


def include_path() -> str:
    """The folder for a C++ compiler's include path: programs include ``adamw_ext/adamw.h``."""
    return str(_FOLDER / "include")
