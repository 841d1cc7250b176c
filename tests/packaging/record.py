"""The result of a run over several Pythons, as a dated file."""

from pathlib import Path
from typing import Any

from benchmarks.device import conditions, write_dated

COLUMNS = {
    "Python": "python",
    "torch": "torch",
    "wheel": "wheel",
    "KB": "kilobytes",
    "build, s": "build_seconds",
    "tests passed": "passed",
    "skipped": "skipped",
    "import, s": "import_seconds",
}


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    known = conditions()
    rows = [{**row, "kilobytes": round(row["bytes"] / 1000)} for row in rows]
    result = {key: known[key] for key in ("date", "processor")} | {"wheels": rows}
    write_dated(folder, "packaging", result, report(result))


def report(result: dict[str, Any]) -> str:
    lines = [
        "# Wheels",
        "",
        f"Built with {result['wheels'][0]['compiler']} on {result['date']} ({result['processor']}), without CUDA "
        "kernels; each installed into an environment of its own and tested there from outside the checkout: files, "
        "metadata, no path of the build, the tests below. The machine did other work, too, so that the seconds "
        "of a build are more than it needs. Import: beyond torch's own, the least of seven processes.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"| {' | '.join('---' for _ in COLUMNS)} |",
        *(f"| {' | '.join(str(row.get(key, '')) for key in COLUMNS.values())} |" for row in result["wheels"]),
        "",
        f"Tests: {', '.join(result['wheels'][0]['tests'])}.",
    ]
    archives = [row["archive"] for row in result["wheels"] if "archive" in row]
    lines += [f"The source archive {name} builds a wheel with the same files." for name in archives]
    return "\n".join(lines) + "\n"
