"""These tests build wheels, so they are collected only under `-m packaging`. They run for each Python of --base."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.packaging import builds, record

ROWS = pytest.StashKey[dict[str, dict[str, Any]]]()


def asked_for(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "packaging"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("packaging")
    group.addoption("--base", action="append", type=Path, help="a Python with torch, and all that builds and tests")
    group.addoption("--built", type=Path, default=builds.ROOT / "out/packaging", help="where wheels are kept")
    group.addoption("--record", type=Path, help="the folder for the results of a run in which nothing failed")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if asked_for(config) else True


@dataclass
class Wheel:
    """A wheel, what it was built from and with, and what is known of it."""

    path: Path
    source: Path
    base: Path
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "base" in metafunc.fixturenames:
        bases = [base.absolute() for base in metafunc.config.getoption("base") or []]
        if not bases:
            raise pytest.UsageError("name at least one Python to build wheels for: --base PYTHON")
        bases = bases if "archive" not in metafunc.fixturenames else bases[:1]
        names = [builds.facts(base)["python"].rpartition(".")[0] for base in bases]
        metafunc.parametrize("base", bases, ids=names, scope="session")


@pytest.fixture(scope="session")
def sources(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("built").absolute() / "sources"
    shutil.rmtree(folder, ignore_errors=True)
    return builds.tracked_files(folder)


@pytest.fixture(scope="session")
def wheel(base: Path, sources: Path, request: pytest.FixtureRequest) -> Wheel:
    version = builds.facts(base)["python"].rpartition(".")[0]
    folder = request.config.getoption("built").absolute() / version
    facts = builds.build_wheel(base, sources, folder)
    row = request.config.stash[ROWS].setdefault(version, facts)
    return Wheel(folder / facts["wheel"], sources, base, folder, row)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder = session.config.getoption("record", None)
    if folder is not None and exitstatus == 0:
        record.write(folder, list(session.config.stash[ROWS].values()))
