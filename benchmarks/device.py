"""The device that is measured on: whether it can be, and what it is; and results that name it."""

import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

import adamw_ext


def check_device(device: str) -> None:
    """Exit with a sentence where times of ours on this device would not be times of ours."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda needs an NVIDIA GPU, but torch {torch.__version__} sees none.")
    if device == "cuda" and not adamw_ext.build_info()["cuda kernels"]:
        sys.exit("This build of adamw_ext has no CUDA kernels: what it does on CUDA is torch's own AdamW.")


def device_facts(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"processor": processor()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "processor": properties.name,
        "gpu": {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "host": processor(),
        },
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def conditions() -> dict[str, Any]:
    """When and on what a run on the CPU is made."""
    return {
        "date": str(date.today()),
        "processor": processor(),
        "load_average": os.getloadavg()[0],
        "build": adamw_ext.build_info(),
    }


def write_dated(out: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write out/NAME-DATE.json and .md, and print the text. ``result`` has the :func:`conditions`."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{name}-{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(text)
