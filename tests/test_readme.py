"""The README's figures are those of the newest results."""

import json

import pytest

from benchmarks import readme
from benchmarks.peers import FUSED, OURS


def test_the_readme_says_what_the_results_say():
    path = readme.ROOT / "README.md"
    assert path.read_text() == readme.rewritten(path.read_text()), "run: python -m benchmarks.readme"


def test_the_newest_results_of_a_subject_are_taken(tmp_path):
    for name in ("cpu-2026-01-31", "cpu-2026-02-01", "cpu-quick-2027-01-01", "cpu-notes"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert readme.newest("cpu", tmp_path) == tmp_path / "cpu-2026-02-01.json"
    assert readme.newest("growth", tmp_path) is None


def test_a_changed_number_changes_the_readme(tmp_path):
    path = readme.newest("cpu")
    result = json.loads(path.read_text())
    peer = next(iter(result["workloads"].values()))["peers"][FUSED]
    peer["ratio"]["median"] = 7.77
    (tmp_path / path.name).write_text(json.dumps(result))
    assert "| 7.77x |" in readme.section(tmp_path)
    assert "| 7.77x |" not in readme.section()


def test_a_missed_target_is_named_with_what_was_measured():
    missed = {"work": "some work", "wanted": ">= 2x", "measured": "1.50 (1.40 to 1.60)", "reached": False}
    (text,) = readme.targets({"targets": [missed, {**missed, "work": "other", "reached": True}]}, "stem")
    assert "1 are reached" in text
    assert "some work, >= 2x: 1.50." in text
    assert "other" not in text


def test_without_markers_nothing_is_written():
    with pytest.raises(ValueError, match="measured: begin"):
        readme.rewritten("# A README\n")
    assert OURS in readme.rewritten(f"a {readme.BEGIN} b {readme.END} c")
