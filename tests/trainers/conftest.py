"""These tests need other libraries, so they are collected only under `-m trainers`; there, none may be skipped."""

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_DECLARED: list[torch.library.Library] = []  # kept: operators go with their library


def asked_for(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "trainers"


def pytest_configure(config: pytest.Config) -> None:
    if asked_for(config):
        os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
        declare_torchvision_operators()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if asked_for(config) else True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The models are tiny."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For libraries that write to the current folder."""
    monkeypatch.chdir(tmp_path)


def declare_torchvision_operators() -> None:
    """Make torchvision importable beside a CPU build of torch.

    Its wheel on the package index is compiled for a torch with CUDA. Beside another its compiled operators do not load,
    and its Python part cannot be imported, since it attaches shape functions to two of them. timm imports it for image
    transforms, and so do transformers and Lightning where they find it; none of these tests calls an operator of it.
    So the two are declared, without an implementation: a call would raise.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return  # the import that needs it will fail
    try:
        for library in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
            ctypes.CDLL(str(library))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
