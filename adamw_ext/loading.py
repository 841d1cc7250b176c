"""Why the compiled module cannot be used here, in a sentence that says what to do."""

import platform
from importlib import machinery, metadata
from pathlib import Path

import torch

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def without_build(torch_version: str) -> str:
    """A version of torch without the words for its build: 2.13.0+cpu is 2.13.0."""
    return torch_version.partition("+")[0]


def why_not_loaded(error: ImportError) -> str:
    folder = Path(__file__).parent
    if not any((folder / f"_C{suffix}").exists() for suffix in machinery.EXTENSION_SUFFIXES):
        return (
            f"adamw_ext in {folder} has not been compiled for Python {platform.python_version()}. If this is its "
            "source folder, start Python in another one to use what is installed, or compile it here: "
            "pip install --no-build-isolation -e ."
        )
    try:
        required = metadata.requires("adamw_ext") or []
    except metadata.PackageNotFoundError:
        required = []
    built_with = [name.removeprefix("torch==") for name in required if name.startswith("torch==")]
    return f"{why_not_with(*built_with)} ({error})"


def why_not_with(built_with: str = "of another version") -> str:
    return (
        f"adamw_ext cannot be loaded with torch {torch.__version__}: it was compiled against torch {built_with} and "
        f"works with no other. Rebuild it in its source folder: {_REBUILD}"
    )
