"""Programs that a sanitizer must stop, and others that it must not: what tests/sanitizers.py runs before any test.

    python -m tests.sanitizer_proofs NAME

Nothing in the extension is changed for them. It is lied to about memory, as no Python code could without ctypes, or one
memory is stepped from two threads by two optimizers, which no optimizer can know.
"""

import ctypes
import gc
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

import adamw_ext
from tests.helpers import assert_same_bits, running_on
from tests.test_bits import Path, stepping_on

LONG = 300_001  # elements: enough for a step to take several threads, and to release the interpreter
ROUNDS = 8


def memory_of(count: int, *, allocated: int, shifted: int = 0) -> Tensor:
    """A tensor of so many floats over an allocation of another number of them, shifted by some bytes."""
    allocate = ctypes.CDLL(None).malloc
    allocate.restype = ctypes.c_void_p
    address = allocate(ctypes.c_size_t(4 * allocated)) + shifted
    array = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(array, dtype=torch.float32)


def step_with(param: Tensor, grad: Tensor, path: Path) -> None:
    param.requires_grad_()
    param.grad = grad
    optimizer = adamw_ext.AdamW([param], capturable=path.capturable)
    optimizer.init_state()
    with stepping_on(optimizer, path):
        optimizer.step()


def write_past_a_param() -> None:
    step_with(memory_of(65, allocated=64), torch.ones(65), Path())


def read_past_a_gradient() -> None:
    param = torch.zeros(65)
    step_with(param, memory_of(65, allocated=64), Path(capturable=True, emulated_arguments=4096))


def misaligned_param() -> None:
    step_with(memory_of(64, allocated=66, shifted=2), torch.ones(64), Path())


def together(*works: Callable[[], None]) -> None:
    barrier, failures = threading.Barrier(len(works)), []

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait()
            for _ in range(ROUNDS):
                work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def new_param(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(LONG, generator=generator).requires_grad_()
    param.grad = torch.randn(LONG, generator=generator)
    return param


def two_optimizers_of_one_param() -> None:
    """A race, and the user's: the promise is that ThreadSanitizer sees our loops race."""
    param = new_param()
    together(*(adamw_ext.AdamW([param]).step for _ in range(2)))


def two_optimizers() -> None:
    params = [new_param(), new_param(1)]
    together(*(adamw_ext.AdamW([param]).step for param in params))
    for seed, param in enumerate(params):
        alone = new_param(seed)
        optimizer = adamw_ext.AdamW([alone])
        for _ in range(ROUNDS):
            optimizer.step()
        assert_same_bits([param], [alone])


def one_optimizer() -> None:
    param = new_param()
    script = torch.classes.adamw_ext.AdamW([param], lr=0.1, max_grad_norm=1.0)
    together(*(lambda: script.step([param.grad]) for _ in range(2)))
    assert script.state()[0]["step"] == 2 * ROUNDS


def changing_threads() -> None:
    """Threads that are new, that wait in the pool, and that have left it."""
    results = []
    for sequence in ([1], [2, 4, 1, 3]):
        param = new_param()
        optimizer = adamw_ext.AdamW([param], max_grad_norm=1.0)
        for i in range(ROUNDS):
            with running_on(threads=sequence[i % len(sequence)]):
                optimizer.step()
        results.append([param, *optimizer.state[param].values()])
    assert_same_bits(*results)


def threads_that_do_not_race() -> None:
    two_optimizers()
    one_optimizer()
    changing_threads()


def keep_nothing() -> None:
    """Makes and drops what the extension allocates, for LeakSanitizer, which looks at what is left at the end."""
    for i in range(ROUNDS):
        small, large = torch.zeros(10, requires_grad=True), new_param()
        small.grad = torch.ones(10)
        optimizer = adamw_ext.AdamW([{"params": [small], "lr": 0.1}, {"params": [large]}], max_grad_norm=float(i + 1))
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        script = torch.classes.adamw_ext.AdamW([small], lr=0.1)
        script.step([small.grad])
        with stepping_on(optimizer, Path(emulated_arguments=4096)):
            optimizer.step()
        del optimizer, script
    gc.collect()


if __name__ == "__main__":
    print(adamw_ext._C.__file__, adamw_ext.library_path(), sep="\n", flush=True)  # what the proof is about
    globals()[sys.argv[1]]()
