"""A C++ program that links libtorch and the library trains without Python, from Python's files and into Python's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

import adamw_ext
from adamw_ext import AdamW
from tests.helpers import Trained

SOURCE = Path(__file__).parent / "libtorch" / "train.cpp"

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is (deprecated|not supported):DeprecationWarning"),
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"),
]


def cuda_runtime_folders() -> set[str]:
    """Where the CUDA runtime is that torch has loaded, and that a build with CUDA kernels needs."""
    paths = re.findall(r"\S*/libcudart\S*", Path("/proc/self/maps").read_text())
    return {str(Path(path).parent) for path in paths}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled as a user would."""
    folder, library = tmp_path_factory.mktemp("libtorch"), Path(adamw_ext.library_path())
    includes = [f"-I{path}" for path in [adamw_ext.include_path(), *include_paths()]]
    folders = [str(library.parent), *library_paths(), *cuda_runtime_folders()]
    command = ["g++", "-std=c++20", "-w", str(SOURCE), *includes, "-o", str(folder / "train")]
    command += [f"-L{path}" for path in folders] + [f"-Wl,-rpath,{path}" for path in folders]
    command += ["-Wl,--disable-new-dtags"]  # the folders hold for what the library needs, too
    command += ["-Wl,--no-as-needed", "-ladamw_ext", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return folder / "train"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[torch.jit.ScriptModule, Tensor, Path]:
    """A scripted model that has made two steps, its inputs, and the folder where both are saved."""
    model = torch.jit.script(Trained(torch.float32, {"weight_decay": 0.2}))
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.train_step(inputs)
    torch.jit.save(model, tmp_path / "model.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    return model, inputs, tmp_path


def run(program: Path, *arguments: object) -> str:
    """In an environment that knows nothing of Python, with this process's threads."""
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment |= {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "ADAMW_EXT_ISA") if key in os.environ}
    command = [str(program), *map(str, arguments)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_python_and_a_program_without_python_take_turns_bit_for_bit(program, saved):
    model, inputs, folder = saved
    before = [param.detach().clone() for param in model.parameters()]
    run(program, "scripted", folder / "model.pt", folder / "inputs.pt", 3, folder / "after.pt")
    for _ in range(3):
        model.train_step(inputs)
    loaded = torch.jit.load(folder / "after.pt")
    assert not any(map(torch.equal, before, model.parameters()))
    for _ in range(2):  # as it was left, and after one more step
        assert all(map(torch.equal, loaded.parameters(), model.parameters()))
        state, expected = loaded.optimizer.state(), model.optimizer.state()
        assert all(torch.equal(state[i][key], expected[i][key]) for i in expected for key in expected[i])
        assert loaded.train_step(inputs) == model.train_step(inputs)


def test_the_cpp_class_gives_the_bits_of_the_python_class(program, saved):
    model, inputs, folder = saved
    run(program, "direct", folder / "model.pt", folder / "inputs.pt", 4, folder / "direct.pt")
    params = list(model.parameters())
    optimizer = AdamW(params, lr=0.1, amsgrad=True, max_grad_norm=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
    theirs, state = torch.load(folder / "direct.pt", weights_only=False)  # TorchScript tags the types of dicts
    assert all(map(torch.equal, params, theirs))
    expected = optimizer.state_dict()["state"]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[i][key], expected[i][key]) for i in expected for key in expected[i])


def test_misuse_throws_what_python_raises(program):
    messages = run(program, "misuse").splitlines()
    expected = [
        "param (group 0, index 1) is undefined",
        "param (group 0, index 0) must have a floating point or complex dtype, but has shape [3], torch.int32, on cpu",
        "Invalid learning rate: -1",
        "grads must have one tensor or None for each of the 1 params, but has 0",
        "the gradient of param (group 0, index 0) must have shape [3], torch.float32, on cpu, but has shape [4]",
        "the gradient of param (group 0, index 0) must have shape [3], torch.float32, on cpu, but has shape [3], "
        "torch.float32, on meta",
        "param (group 0, index 0) must be a strided CPU tensor in this build, but has shape [3], torch.float32, on ",
        "param (group 0, index 0) needs 12 bytes of storage, but its storage holds 0 bytes",
        "there is no param group 1: there are 1",
    ]
    assert len(messages) == len(expected)
    for message, start in zip(messages, expected, strict=True):
        assert message.startswith(start)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_the_library_needs_no_symbol_of_python():
    answer = subprocess.run(["nm", "-D", adamw_ext.library_path()], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in answer.stdout.splitlines()]
    assert any("adamw_ext" in name for name in names)
    assert not [name for name in names if name.startswith(("Py", "_Py", "THP"))]
    needed = subprocess.run(["readelf", "-d", adamw_ext.library_path()], capture_output=True, text=True, check=True)
    assert "python" not in needed.stdout
