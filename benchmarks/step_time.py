"""Times one optimizer step against its peers and the least time that its bytes take: python -m benchmarks.step_time

Writes DEVICE-DATE.json, .md and .png: times, ratios, and which targets they reach.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import adamw_ext
from benchmarks.clocks import clocks_on
from benchmarks.comparison import measure, reason
from benchmarks.device import check_device, device_facts
from benchmarks.kernels import kernels_of
from benchmarks.measure import build_seconds, import_seconds
from benchmarks.mode_timing import Bench, measure_clipping
from benchmarks.modes_report import clipping_part
from benchmarks.peers import OURS, rival_versions
from benchmarks.report import markdown, peers_table, workload_summary
from benchmarks.targets import judge
from benchmarks.workloads import workloads_on

RESULTS = Path(__file__).parent / "results"
QUICK_SECONDS = 0.2


def parse_arguments() -> argparse.Namespace:
    names = {device: [workload.name for workload in workloads_on(device)] for device in ("cpu", "cuda")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(names), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds, into a temporary folder")
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="; ".join(map(" ".join, names.values())))
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time for each workload")
    args = parser.parse_args()
    known = names[args.device]
    args.workloads = args.workloads or known
    if unknown := set(args.workloads) - set(known):
        parser.error(f"no such workload on {args.device}: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return args


def add_kernels(result: dict[str, Any]) -> None:
    """How many kernels each peer's step takes. Last of all, when nothing more is timed."""
    try:
        counts = kernels_of(list(result["workloads"]), result["quick"])
    except (subprocess.SubprocessError, ValueError) as error:
        result.setdefault("failures", {})["kernel counts"] = reason(error)
        return
    for name, workload in result["workloads"].items():
        for peer, count in counts.get(name, {}).items():
            if count is not None and peer in workload["peers"]:
                workload["peers"][peer]["kernels"] = count


def add_clipping(result: dict[str, Any], args: argparse.Namespace) -> None:
    """``max_grad_norm`` against ``clip_grad_norm_`` before torch's step."""
    for workload in workloads_on(args.device, args.quick):
        if workload.name.startswith("gpt2") and workload.name in args.workloads:
            seconds = QUICK_SECONDS if args.quick else args.seconds / 4
            measured = measure_clipping(workload.dtype, Bench({workload.dtype: workload}), seconds)
            result.setdefault("clipping", {})[workload.name] = measured


def clipped_in(result: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return result.get("clipping", {}).values()


def add_build(result: dict[str, Any]) -> None:
    try:
        result["build_seconds"] = build_seconds()
    except subprocess.SubprocessError as error:
        result.setdefault("failures", {})["build"] = reason(error)


def finish(result: dict[str, Any], path: Path) -> None:
    """Judge and write what there is so far: a run that is cut short leaves what it has measured."""
    if not result["quick"]:
        result["targets"] = judge(result)
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    clipping = [f"## Clipping, {clipped['dtype']}\n\n{clipping_part(clipped)}\n" for clipped in clipped_in(result)]
    path.with_suffix(".md").write_text("\n".join([markdown(result), *clipping]))


def main() -> None:
    args = parse_arguments()
    check_device(args.device)
    out = args.out or (Path(tempfile.mkdtemp(prefix="adamw_ext-bench-")) if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": args.device,
        **device_facts(args.device),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "build": adamw_ext.build_info(),
        "rivals": rival_versions() if args.device == "cpu" else {},
        "quick": args.quick,
        "import_seconds": import_seconds(),
        "workloads": {},
    }
    path = out / f"{args.device}-{result['date']}"
    for workload in workloads_on(args.device, args.quick):
        if workload.name not in args.workloads:
            continue
        try:
            measured = measure(workload, args.device, QUICK_SECONDS if args.quick else args.seconds)
        except Exception as error:
            # What has been measured is worth having, and the other workloads may work.
            traceback.print_exc()
            result.setdefault("failures", {})[workload.name] = reason(error)
            continue
        result["workloads"][workload.name] = measured
        peers = peers_table(measured["peers"], clocks_on(args.device))
        print(f"\n{workload.title}: {workload_summary(measured)}\n\n{peers}", flush=True)
        if broken := [name for name in measured.get("failures", {}) if name.startswith(OURS)]:
            result.setdefault("failures", {})[workload.name] = f"{', '.join(broken)} failed, see its table"
        finish(result, path)
    if not result["workloads"]:
        sys.exit("No workload could be measured.")
    if args.device == "cuda":
        add_kernels(result)
    else:
        add_clipping(result, args)
        if not args.quick:
            finish(result, path)
            add_build(result)
    finish(result, path)
    from benchmarks.picture import draw  # last, when all is written: a GPU machine may lack matplotlib

    draw(result, path.with_suffix(".png"))
    print(f"\n{markdown(result).split('##')[0]}written: {path.name}.json, .md and .png in {out}")
    if "failures" in result:
        sys.exit(f"Not measured in full: {', '.join(result['failures'])}.")


if __name__ == "__main__":
    main()
