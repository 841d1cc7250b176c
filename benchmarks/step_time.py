"""Times one optimizer step against its peers and the streaming floor: python -m benchmarks.step_time

Writes DEVICE-DATE.json, .md and .png: times, ratios, and which of the contract's targets they reach.
"""

import argparse
import json
import os
import platform
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import adamw_ext
from benchmarks.measure import CLOCKS, allocated_bytes, import_seconds, interleaved, quartiles, ratios
from benchmarks.peers import DEEPSPEED, FLOOR, OURS, peers_on
from benchmarks.picture import draw
from benchmarks.report import judge, markdown, peers_table, workload_summary
from benchmarks.workloads import Workload, full_workloads, quick_workloads

RESULTS = Path(__file__).parent / "results"
LEAST_ROUNDS = 9


def measure(workload: Workload, device: str, budget: float) -> dict[str, Any]:
    params = workload.make_params(device)
    steps = {name: make_step(params) for name, make_step in peers_on(device).items()}
    samples = interleaved(steps, CLOCKS[device], budget, LEAST_ROUNDS)
    if not all(param.isfinite().all() for param in params):
        raise RuntimeError(f"params of {workload.name} are no longer finite: the times mean nothing")
    peers = {}
    for name, seconds in samples.items():
        spread = quartiles(seconds)
        peers[name] = {
            "seconds": spread,
            "ratio": ratios(seconds, samples[OURS]),
            "gigabytes_per_second": workload.step_bytes / spread["median"] / 1e9,
            "allocated_bytes": allocated_bytes(steps[name]),
        }
    result = {
        "title": workload.title,
        "tensors": len(workload.shapes),
        "numel": workload.numel,
        "step_bytes": workload.step_bytes,
        "rounds": len(samples[OURS]),
        "peers": peers,
    }
    if FLOOR in samples:
        result["ours_over_floor"] = ratios(samples[OURS], samples[FLOOR])
    return result


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse_arguments() -> argparse.Namespace:
    names = [workload.name for workload in full_workloads()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(CLOCKS), default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds, into a temporary folder")
    parser.add_argument("--workloads", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time for each workload")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    out = args.out or (Path(tempfile.mkdtemp(prefix="adamw_ext-bench-")) if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": args.device,
        "processor": processor(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "build": adamw_ext.build_info(),
        "deepspeed": metadata.version("deepspeed") if DEEPSPEED in peers_on(args.device) else None,
        "quick": args.quick,
        "import_seconds": import_seconds(),
        "workloads": {},
    }
    for workload in quick_workloads() if args.quick else full_workloads():
        if workload.name in args.workloads:
            measured = measure(workload, args.device, 0.2 if args.quick else args.seconds)
            result["workloads"][workload.name] = measured
            print(f"\n{workload.title}: {workload_summary(measured)}\n\n{peers_table(measured['peers'])}", flush=True)
    if not args.quick:
        result["targets"] = judge(result)
    path = out / f"{args.device}-{result['date']}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    draw(result, path.with_suffix(".png"))
    print(f"\n{markdown(result).split('##')[0]}written: {path.name}.json, .md and .png in {out}")


if __name__ == "__main__":
    main()
