"""A multi-tensor AdamW for PyTorch with the same bits on every path.

>>> from adamw_ext import AdamW          # instead of: from torch.optim import AdamW
"""

import torch  # first: it loads the libraries that the extension binds to

from adamw_ext.loading import why_not_loaded, why_not_with, without_build

try:
    from adamw_ext import _C
except ImportError as error:
    raise ImportError(why_not_loaded(error)) from error

if without_build(_C.built_with_torch) != without_build(torch.__version__):  # its classes may be laid out differently
    raise ImportError(why_not_with(_C.built_with_torch))

from adamw_ext import checkpoint, functional
from adamw_ext.info import __version__, build_info, include_path, library_path
from adamw_ext.optimizer import AdamW

__all__ = ["AdamW", "__version__", "build_info", "checkpoint", "functional", "include_path", "library_path"]
