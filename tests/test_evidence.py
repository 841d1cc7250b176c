"""docs/EVIDENCE.md names tests, results and commands that exist, and leaves nothing open but what needs a GPU."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "EVIDENCE.md"
NEEDS_GPU = "needs a GPU"


def rows() -> list[list[str]]:
    """The cells of every line of a table but its head."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "promise" and not set(row[0]) <= set("- ")]


def named_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_promise_has_a_test_a_figure_and_a_command() -> None:
    assert len(rows()) > 30
    for row in rows():
        assert len(row) == 4, row
        assert all(cell.strip(" |") for cell in row), row
        assert named_in(row[1]), f"{row[0]}: no test is named"
        assert re.search(r"\d", row[2]) or row[2].startswith(NEEDS_GPU), f"{row[0]}: {row[2]} is no figure"


def test_the_tests_exist() -> None:
    for row in rows():
        for name in named_in(row[1]):
            file, _, test = name.partition("::")
            path = ROOT / "tests" / file
            assert path.exists(), f"{row[0]}: there is no tests/{file}"
            assert not test or re.search(rf"^ *def {test}\(", path.read_text(), re.MULTILINE), f"there is no {name}"


def test_the_figures_come_from_results_that_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", PAGE.read_text())
    assert any("benchmarks/results/" in link for link in links)
    for link in links:
        assert (PAGE.parent / link.partition("#")[0]).exists(), f"{link} does not exist"


def test_the_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for row in rows():
        commands = named_in(row[3])
        assert commands, f"{row[0]}: no command"
        for command in commands:
            words = command.split()
            assert words[0] == "make", f"{row[0]}: {command}"
            assert words[1] in targets, f"{row[0]}: the Makefile has no {words[1]}"


@pytest.mark.parametrize("marked", [True, False])
def test_only_what_runs_on_a_gpu_is_without_a_figure(marked: bool) -> None:
    for row in rows():
        if row[2].startswith(NEEDS_GPU) is marked:
            assert ("`make gpu-check`" in row[3]) is marked, row
