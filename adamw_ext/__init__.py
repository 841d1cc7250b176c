"""A multi-tensor AdamW for PyTorch with the same bits on every path.

>>> from adamw_ext import AdamW          # instead of: from torch.optim import AdamW
"""

import torch  # first: it loads the libraries that the extension binds to

try:
    from adamw_ext import _C  # noqa: F401
except ImportError as error:
    from importlib import metadata

    raise ImportError(
        f"adamw_ext {metadata.version('adamw_ext')} cannot be loaded with torch {torch.__version__}: it works only "
        "with the torch it was compiled against. Rebuild it in its source folder: "
        f"pip install --no-build-isolation --force-reinstall --no-deps . ({error})"
    ) from error

from adamw_ext import checkpoint, functional
from adamw_ext.info import __version__, build_info, include_path, library_path
from adamw_ext.optimizer import AdamW

__all__ = ["AdamW", "__version__", "build_info", "checkpoint", "functional", "include_path", "library_path"]
