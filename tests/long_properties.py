"""Draws other scenarios for tests/test_properties.py than its own, at random, and writes down how many.

    python -m tests.long_properties [--examples N] [--seed N] [--out benchmarks/results]

A failure prints the scenario, which can be pasted, and the seed, which draws the same scenarios again.
"""

import argparse
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from benchmarks.device import conditions, write_dated
from tests.jobs import done
from tests.strategies import PROFILE

FILE = "tests/test_properties.py"


class Outcomes:
    """Of pytest's tests, with the seconds that each took."""

    def __init__(self) -> None:
        self.tests: list[tuple[str, str, float]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.tests.append((report.nodeid.split("::")[1], report.outcome, report.duration))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="of each property")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--out", type=Path, help="where to write the record; without it none is written")
    arguments = parser.parse_args()
    settings.register_profile("long", max_examples=arguments.examples, **PROFILE)
    outcomes = Outcomes()
    options = ["--hypothesis-profile=long", f"--hypothesis-seed={arguments.seed}", "-p", "no:cacheprovider"]
    print(f"seed {arguments.seed}, {arguments.examples} examples of each property")
    start = time.perf_counter()
    status = pytest.main([FILE, *options], plugins=[outcomes])
    result = {
        **conditions(),
        "seed": arguments.seed,
        "examples_of_each_property": arguments.examples,
        "minutes": (time.perf_counter() - start) / 60,
        "tests": [{"name": name, "outcome": how, "seconds": seconds} for name, how, seconds in outcomes.tests],
        "counts": dict(done),
    }
    if arguments.out:
        write_dated(arguments.out, "properties", result, text_of(result))
    else:
        print(text_of(result))
    return int(status)


def text_of(result: dict[str, Any]) -> str:
    tests = [f"| `{test['name']}` | {test['outcome']} | {test['seconds']:.0f} |" for test in result["tests"]]
    counts = [f"| {what} | {count:,} |" for what, count in sorted(result["counts"].items(), key=order)]
    command = f"python -m tests.long_properties --examples {result['examples_of_each_property']}"
    return "\n".join(
        [
            "# Properties of the optimizer over random scenarios",
            "",
            f"{result['date']}, {result['processor']}, torch {result['build']['torch']}; "
            f"one process, {result['minutes']:.0f} minutes.",
            f"`{command} --seed {result['seed']}`; what is drawn: tests/strategies.py.",
            "",
            "| property | outcome | seconds |",
            "| --- | --- | --- |",
            *tests,
            "",
            "A scenario is a list of tensors in groups and a history of steps; a training is one run of it, some way.",
            "After each step every byte of every storage was compared with what may have been written.",
            "",
            "| what | count |",
            "| --- | --- |",
            *counts,
            "",
        ]
    )


def order(item: tuple[str, int]) -> tuple[bool, int]:
    """Totals, the largest first; then the kinds of scenarios."""
    return item[0].startswith("scenarios,"), -item[1]


if __name__ == "__main__":
    sys.exit(main())
