"""A whole training step in a CUDA graph: replays have the bits of eager steps, whatever happens between them.

The step is forward, backward, gradient scaling, clipping and the optimizer, on a transformer block. Its learning rates
change every step, and some steps overflow, the first one among them. On the CPU a replay is a plain call, so that the
logic of this file runs there too.
"""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import adamw_ext
from tests.helpers import DEVICES, Captured, assert_same_bits, on_cpu, on_stream

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 16
HYPER = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
OVERFLOWS = (0, 3, 4)  # steps whose loss is infinite
LEARNING_RATES = [float(torch.tensor(0.02 / (1 + i % 5))) for i in range(20)]  # numbers that float32 can hold
INIT_SCALE = 2.0**8
GARBAGE = 0xA5  # what memory taken by others is filled with

SCALINGS = ("scaler", "clipped", "by hand")
PLANS = {
    "the first step included": "crrrrrrrr",
    "after eager steps": "eeecrrrrrr",
    "with eager steps between": "ecrrerreer",
    "with a checkpoint loaded between": "ecrrsrrlrrelrr",
    "captured right after loading": "eeselcrrrr",
    "with a group added and trained": "ecrrgrerrger",
    "under memory pressure": "ecprrslprrleprrperr",
    "of two graphs": "ecCrhhrrhehrslhr",
}


class Block(nn.Module):
    """A transformer block: matrices and their biases in one dtype, norms in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, dtype=dtype)
        self.out = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype)
        self.down = nn.Linear(2 * WIDTH, WIDTH, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.qkv.weight.dtype
        query, key, value = self.qkv(self.norms[0](x).to(dtype)).chunk(3, dim=-1)
        weights = (query @ key.transpose(-1, -2) / WIDTH**0.5).softmax(-1)
        x = x + self.out(weights @ value).float()
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x).to(dtype)))).float()


class Training:
    """A block under training. Data, learning rates and overflows follow from the number of the step alone.

    `run` takes a plan, one letter for each thing to do:

        e  a step          c  capture the whole step      r  replay it
                           C  capture another one, of the matrices alone on half the batch      h  replay that
        s  save a checkpoint      l  load it
        g  add a param group, of a param that eager steps train and the graphs do not know
        p  take and overwrite all memory that the allocator has free, and keep it to see whether a replay writes there

    Without graphs, r and h are steps too, and c, C and p are nothing. Scaling is one of
        "scaler": a GradScaler hands its tensors to the optimizer, where that is AMP-aware;
        "clipped": a GradScaler unscales, and gradients are clipped;
        "by hand": the loop sets grad_scale and found_inf itself, and clips.
    """

    def __init__(
        self,
        device: str,
        scaling: str,
        *,
        graphs: bool = False,
        dtype: torch.dtype = torch.float32,
        lr_dtype: torch.dtype | None = None,  # of learning rates in tensors on the device; None: floats
        side_stream: bool = False,  # eager steps and captures run there
        share_pool: bool = False,
        **flags: bool,
    ) -> None:
        self.device, self.scaling, self.graphs, self.share_pool = device, scaling, graphs, share_pool
        self.lr_dtype = lr_dtype
        self.stream = torch.cuda.Stream() if side_stream and device == "cuda" else None
        self.number = 0
        self.captured: dict[str, Captured] = {}
        self.saved: dict[str, dict[str, object]] = {}
        self.held: list[Tensor] = []
        self.added: list[nn.Parameter] = []

        torch.manual_seed(0)
        self.model = Block(dtype).to(device)
        self.x = torch.zeros(4, 5, WIDTH, device=device)
        self.y = torch.zeros(4, 5, WIDTH, device=device)
        self.blow_up = torch.ones((), device=device)
        matrices = [param for param in self.model.parameters() if param.dim() == 2]
        others = [param for param in self.model.parameters() if param.dim() != 2]
        groups = [
            {"params": matrices, "lr": self.make_lr()},
            {"params": others, "lr": self.make_lr(), "weight_decay": 0.0, "eps": 1e-4},
        ]
        self.optimizer = adamw_ext.AdamW(groups, **HYPER, **flags)
        self.scale_by_hand = torch.tensor(INIT_SCALE, device=device)
        self.scaler = torch.amp.GradScaler(device, init_scale=INIT_SCALE, growth_interval=2)
        self.scaler.scale(torch.zeros((), device=device))  # makes the scaler's tensors: a graph must not
        self.warm_up()

    def make_lr(self) -> float | Tensor:
        return 0.0 if self.lr_dtype is None else torch.zeros((), dtype=self.lr_dtype, device=self.device)

    def warm_up(self) -> None:
        """Use all that a step uses except the optimizer: torch's libraries must be loaded before a capture."""
        with on_stream(torch.cuda.Stream() if self.device == "cuda" and self.stream is None else self.stream):
            self.backward(self.x)
            self.backward(self.x[:2])
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.zero_grad()

    # One step: what happens in a graph.

    def backward(self, x: Tensor) -> None:
        loss = (self.model(x) - self.y[: len(x)]).square().mean() * self.blow_up
        if self.scaling == "by hand":
            (loss * self.scale_by_hand).backward()
        else:
            self.scaler.scale(loss).backward()

    def step(self, *, half: bool = False, added: bool = False) -> None:
        self.optimizer.zero_grad()
        self.backward(self.x[:2] if half else self.x)
        if half:
            for param in self.optimizer.param_groups[1]["params"]:
                param.grad = None
        if added:
            for param in self.added:
                param.grad = torch.full_like(param, 0.25)
        if self.scaling == "by hand":
            self.step_by_hand()
            return
        if self.scaling == "clipped":
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def step_by_hand(self) -> None:
        grads = [param.grad for param in self.model.parameters() if param.grad is not None]
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5 * INIT_SCALE, error_if_nonfinite=False, foreach=True)
        self.optimizer.found_inf = torch.stack([grad.isfinite().logical_not().any() for grad in grads]).sum().float()
        self.optimizer.grad_scale = self.scale_by_hand
        self.optimizer.step()
        del self.optimizer.found_inf, self.optimizer.grad_scale

    # What a training loop does between steps.

    def prepare(self) -> None:
        generator = torch.Generator().manual_seed(self.number)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.y.copy_(torch.randn(self.y.shape, generator=generator))
        self.blow_up.fill_(torch.inf if self.number in OVERFLOWS else 1.0)
        for index, group in enumerate(self.optimizer.param_groups):
            lr = LEARNING_RATES[self.number] / 2**index
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.number += 1

    def run(self, plan: str) -> "Training":
        for letter in plan:
            match letter:
                case "c" | "C":
                    self.capture(half=letter == "C")
                case "r" | "h" if self.graphs:
                    self.prepare()
                    self.optimizer.sync_hyperparameters()
                    self.captured[letter].replay()
                case "e" | "r" | "h":
                    self.prepare()
                    with on_stream(self.stream):
                        self.step(half=letter == "h", added=letter == "e")
                case "s":
                    self.saved = self.checkpoint()
                case "l":
                    self.load(self.saved)
                case "g":
                    self.added.append(nn.Parameter(torch.ones(7, device=self.device)))
                    self.optimizer.add_param_group(
                        {"params": self.added[-1:], "lr": self.make_lr(), "weight_decay": 0.3}
                    )
                case "p":
                    self.take_free_memory()
        return self

    def capture(self, *, half: bool) -> None:
        if not self.graphs:
            return
        if self.number == 0:
            self.optimizer.init_state()
        other = self.captured.get("r") if self.share_pool else None
        self.captured["h" if half else "r"] = Captured(
            lambda: self.step(half=half), self.device, stream=self.stream, share_pool_with=other
        )

    def checkpoint(self) -> dict[str, dict[str, object]]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, checkpoint: dict[str, dict[str, object]]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def take_free_memory(self) -> None:
        """All of it has been taken when the allocator has asked the device for more."""
        if not self.graphs or self.device == "cpu":
            return
        for stream in (None, self.stream):
            for size in (512, 2**21):  # one pool serves tensors below 1 MiB, in units of 512 bytes, another the rest
                reserved = torch.cuda.memory_reserved()
                with on_stream(stream):
                    while torch.cuda.memory_reserved() == reserved:
                        self.held += [
                            torch.full((size,), GARBAGE, dtype=torch.uint8, device=self.device) for _ in range(32)
                        ]

    def results(self) -> list[Tensor]:
        """Params, state, step counts and the scaler's scale."""
        if self.held:
            assert bool((torch.cat(self.held) == GARBAGE).all()), "a replay has written to memory of others"
        params = [*self.model.parameters(), *self.added]
        states = [self.optimizer.state[param] for param in params if param in self.optimizer.state]
        moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
        steps = torch.stack([state["step"].cpu() for state in states])
        results = on_cpu([*params, *moments, steps, self.scaler._scale])
        assert all(bool(tensor.isfinite().all()) for tensor in results)
        return results


def capturable(scaling: str) -> dict[str, bool]:
    """For a whole captured step: a GradScaler reads found_inf on the host unless the optimizer does it."""
    return {"capturable": True, "fused": scaling != "by hand"}


def assert_replays_equal_eager_steps(device: str, scaling: str, plan: str, **options: object) -> None:
    """Bit for bit, to eager capturable steps and to eager steps whose counts are on the host."""
    graphs = Training(device, scaling, graphs=True, **capturable(scaling), **options).run(plan).results()
    eager = Training(device, scaling, **capturable(scaling), **options).run(plan)
    options["lr_dtype"] = None
    on_host = Training(device, scaling, **options).run(plan)
    started = Training(device, scaling, **options)
    for param, start in zip(eager.model.parameters(), started.model.parameters(), strict=True):
        assert not torch.equal(param, start), "the steps moved nothing"
    assert eager.number == sum(letter in "erh" for letter in plan)
    assert_same_bits(graphs, eager.results(), "replayed, eager")
    assert_same_bits(graphs, on_host.results(), "replayed, eager with steps on the host")


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("device", DEVICES)
def test_replays_have_the_bits_of_eager_steps(device: str, plan: str, scaling: str) -> None:
    """Learning rates are floats, changed before every step."""
    assert_replays_equal_eager_steps(device, scaling, plan)


@pytest.mark.parametrize("plan", [PLANS["with a checkpoint loaded between"], PLANS["of two graphs"]], ids=["l", "h"])
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_learning_rates_may_be_tensors_on_the_device(
    device: str, dtype: torch.dtype, lr_dtype: torch.dtype | None, plan: str
) -> None:
    """Also where the params have two dtypes."""
    assert_replays_equal_eager_steps(device, "clipped", plan, dtype=dtype, lr_dtype=lr_dtype)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("plan", ["eeecrrrerr", "crrrerselrr", "eecprrsleprr"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_may_be_captured_on_the_stream_of_the_eager_steps(device: str, plan: str, scaling: str) -> None:
    assert_replays_equal_eager_steps(device, scaling, plan, side_stream=True)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("device", DEVICES)
def test_two_graphs_may_share_a_memory_pool(device: str, scaling: str) -> None:
    assert_replays_equal_eager_steps(device, scaling, PLANS["of two graphs"], share_pool=True)


@pytest.mark.parametrize("captures_first", [False, True], ids=["load_then_capture", "capture_then_load"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(device: str, scaling: str, captures_first: bool) -> None:
    """A new model and optimizer load a file into a graph that exists already, or before it does."""
    unstopped = Training(device, scaling, graphs=True, **capturable(scaling)).run("ecrrrr")
    file = io.BytesIO()
    torch.save([unstopped.checkpoint(), unstopped.scaler.state_dict()], file)
    unstopped.run("rrrr")

    file.seek(0)
    checkpoint, scale = torch.load(file, weights_only=True, map_location="cpu")
    resumed = Training(device, scaling, graphs=True, **capturable(scaling))
    if captures_first:
        resumed.run("cr")
    resumed.load(checkpoint)
    resumed.scaler.load_state_dict(scale)
    resumed.number = 5
    resumed.run("rrrr" if captures_first else "crrrr")
    assert_same_bits(resumed.results(), unstopped.results())
