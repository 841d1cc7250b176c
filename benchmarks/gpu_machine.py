"""What the machine has: the GPU, the CUDA toolkit, compute-sanitizer."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# In a process of its own, so that the one that starts the others holds no memory of the GPU.
PROBE = """
import json, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
if facts["available"]:
    facts["name"] = torch.cuda.get_device_name(0)
    facts["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(0))
print(json.dumps(facts))
"""


def probe() -> dict[str, str]:
    """Facts about torch and GPU 0. Exits with one sentence where there is no GPU to check on."""
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", PROBE], capture_output=True, text=True)
    if answer.returncode != 0:
        sys.exit(f"gpu-check needs torch, but {sys.executable} cannot import it: {last_line(answer.stderr)}")
    facts = json.loads(last_line(answer.stdout))
    if not facts["available"]:
        built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
        sys.exit(f"gpu-check needs an NVIDIA GPU, but torch {facts['torch']} ({built}) sees none.")
    return facts


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def find_cuda_home() -> Path | None:
    """The toolkit's folder. An nvcc on PATH may be a wrapper that lies elsewhere, so nvcc itself is asked."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if is_toolkit(folder := Path(os.environ.get(variable) or "/nowhere")):
            return folder
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        answer = subprocess.run(command, capture_output=True, text=True)
        found = re.search(r"^#\$ TOP=(.+)$", answer.stdout + answer.stderr, re.MULTILINE)
        candidates = [Path(found[1].strip())] if found else []
        for folder in [*candidates, Path(nvcc).resolve().parent.parent]:
            if is_toolkit(folder):
                return folder.resolve()
    standard = Path("/usr/local/cuda")
    return standard if is_toolkit(standard) else None


def is_toolkit(folder: Path) -> bool:
    return (folder / "bin" / "nvcc").is_file()


def find_sanitizer(cuda_home: Path | None) -> str | None:
    places = [os.environ.get("PATH", "")]
    if cuda_home is not None:
        places += [str(cuda_home / "bin"), str(cuda_home / "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))
