"""Bad input at random, until told to stop.

    python -m tests.fuzzing --seconds 600 [--out benchmarks/results]  # new seeds, every entrance
    python -m tests.fuzzing --entrance load_state_dict --seed 12345   # one case again

Cases run in child processes, so that a crash is found, named by its entrance and seed, and the run goes on.
"""

import argparse
import secrets
import sys
from pathlib import Path

from benchmarks.device import conditions, write_dated
from tests.fuzzing.cases import ENTRANCES
from tests.fuzzing.run import Tally, fuzz, load_entrances, run_here


def main() -> int:
    load_entrances()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__.splitlines()[0])
    parser.add_argument("--entrance", choices=sorted(ENTRANCES), action="append", help="default: all")
    parser.add_argument("--seed", type=int, help="run this one case here, and show what it raises")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, help="write the record of the run to this folder")
    arguments = parser.parse_args()
    names = arguments.entrance or list(ENTRANCES)
    if arguments.seed is not None:
        for name in names:
            print(name, arguments.seed, run_here(name, arguments.seed).value)
        return 0
    first = secrets.randbits(40)
    print(f"seeds from {first}", flush=True)
    tally = fuzz(names, first=first, seconds=arguments.seconds)
    result = {**conditions(), "first_seed": first, "seconds": arguments.seconds, **tally.as_dict()}
    text = report(tally, result)
    if arguments.out:
        write_dated(arguments.out, "fuzzing", result, text)
    else:
        print(text)
    return bool(tally.broken)


def report(tally: Tally, result: dict[str, object]) -> str:
    build = result["build"]
    lines = [
        "# Bad input at random",
        "",
        f"{result['date']}, {result['processor']}, torch {build['torch']}; one process at a time, "  # type: ignore[index]
        f"{result['seconds']:.0f} s, seeds from {result['first_seed']}. By `python -m tests.fuzzing`. A case is",
        "refused, with nothing changed and the next good step right to the bit; or accepted; or broken: a crash, a",
        "change by a refusal, other bits, an internal error.",
        "",
        "| entrance | cases | refused | accepted | broken |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, counts in tally.counts.items():
        refused, accepted, broken = (counts[key] for key in ("refused", "accepted", "broken"))
        lines.append(f"| {name} | {refused + accepted + broken} | {refused} | {accepted} | {broken} |")
    totals = [sum(counts[key] for counts in tally.counts.values()) for key in ("refused", "accepted", "broken")]
    lines += [f"| all | {sum(totals)} | {totals[0]} | {totals[1]} | {totals[2]} |", ""]
    lines += [f"- {name}, seed {seed}: {' '.join(what.split())[:300]}" for name, seed, what in tally.broken]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
