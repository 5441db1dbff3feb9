"""The parts of the measurement, in order of worth: what a command that ends early lacks is what matters least.

Nothing heavy is imported here: the parts themselves are, each in a process of its own.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec

ON_TORCH = ("torch", "psutil")
"""Packages that parts without any model import."""
LEARNED = ("torch", "transformers", "accelerate", "psutil", "annotated_types")
"""Packages that the models, the losses and their benchmarks import."""
TRAINED = (*LEARNED, "pydantic", "yaml", "rich", "safetensors")
"""Packages that the training loop imports."""
WHOLE = (*TRAINED, "datasets", "matplotlib", "tqdm")
"""Packages that train.py imports."""


@dataclass(frozen=True)
class Part:
    """One question to the device."""

    name: str
    module: str
    """Below `benchmarks.gpu`."""
    function: str
    """Takes a `Bench` and `options`; yields rows, which are dicts."""
    title: str
    limit: int
    """Seconds at most, in a budget of ten minutes; about half of it is expected on a fast card."""
    packages: tuple[str, ...]
    """Packages without which the part cannot run."""
    needs_gpu: bool = False
    options: dict = field(default_factory=dict)
    """Keyword arguments of the function."""

    def obstacle(self, device_type: str) -> str:
        """Return the reason why the part cannot run here; empty if nothing is known to be in its way."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"

        if self.needs_gpu and device_type != "cuda":
            return f"needs a GPU, the device is {device_type}"
        return ""


PARTS = (
    # What the machine can do, and whether the host ever waits for it.
    Part(
        name="where",
        module="machine",
        function="where",
        title="The machine: bandwidth and products",
        limit=40,
        packages=ON_TORCH,
    ),
    Part(
        name="waits",
        module="checks",
        function="waits",
        title="Optimizer steps in which the host waits for the GPU",
        limit=50,
        packages=TRAINED,
        needs_gpu=True,
    ),
    # Time and memory in bf16, in which most people train.
    Part(
        name="step_bf16",
        module="steps",
        function="step",
        title="A micro-batch in bf16: forward and backward",
        limit=70,
        packages=LEARNED,
        options={"precision": "bf16"},
    ),
    Part(
        name="head_bf16",
        module="heads",
        function="head",
        title="The student's head in bf16",
        limit=80,
        packages=LEARNED,
        options={"precision": "bf16"},
    ),
    Part(
        name="train_bf16",
        module="runs",
        function="train",
        title="train.py in bf16, end to end",
        limit=110,
        packages=WHOLE,
        options={"precision": "bf16"},
    ),
    Part(
        name="forecast",
        module="steps",
        function="forecast",
        title="Memory of training, forecast and counted",
        limit=60,
        packages=WHOLE,
        needs_gpu=True,
    ),
    # The same in fp16, for cards that have no bf16.
    Part(
        name="step_fp16",
        module="steps",
        function="step",
        title="A micro-batch in fp16: forward and backward",
        limit=70,
        packages=LEARNED,
        needs_gpu=True,
        options={"precision": "fp16"},
    ),
    Part(
        name="train_fp16",
        module="runs",
        function="train",
        title="train.py in fp16, end to end",
        limit=110,
        packages=WHOLE,
        needs_gpu=True,
        options={"precision": "fp16"},
    ),
    # Kernels and values.
    Part(
        name="attention",
        module="machine",
        function="attention",
        title="Kernels that attention takes",
        limit=30,
        packages=ON_TORCH,
        needs_gpu=True,
    ),
    Part(
        name="turing",
        module="steps",
        function="step",
        title="A micro-batch in fp16, the card made to choose as a T4",
        limit=50,
        packages=LEARNED,
        needs_gpu=True,
        options={"precision": "fp16", "as_t4": True},
    ),
    Part(
        name="gradients",
        module="numerics",
        function="gradients",
        title="Gradients beside float64",
        limit=30,
        packages=LEARNED,
    ),
    # Runs that are repeated, continued or short of memory.
    Part(
        name="repeat",
        module="runs",
        function="repeat",
        title="The same run again, and continued",
        limit=100,
        packages=WHOLE,
        options={"deterministic": False},
    ),
    Part(
        name="repeat_deterministic",
        module="runs",
        function="repeat",
        title="The same with training.deterministic",
        limit=100,
        packages=WHOLE,
        options={"deterministic": True},
    ),
    Part(
        name="tight",
        module="runs",
        function="tight",
        title="Memory that runs out in step 4",
        limit=60,
        packages=WHOLE,
        needs_gpu=True,
    ),
    # Everything else.
    Part(
        name="quantised",
        module="numerics",
        function="quantised",
        title="A teacher of few bits",
        limit=60,
        packages=(*LEARNED, "safetensors", "bitsandbytes"),
        needs_gpu=True,
    ),
    Part(
        name="head_fp16",
        module="heads",
        function="head",
        title="The student's head in fp16",
        limit=50,
        packages=LEARNED,
        needs_gpu=True,
        options={"precision": "fp16"},
    ),
    Part(
        name="top_k",
        module="heads",
        function="top_k",
        title="The teacher's largest logits",
        limit=20,
        packages=LEARNED,
    ),
    Part(
        name="pair",
        module="runs",
        function="real_pair_run",
        title="A real pair, trained for some steps and evaluated",
        limit=150,
        packages=WHOLE,
    ),
    Part(
        name="verify",
        module="checks",
        function="verify",
        title="verify_fixes.py",
        limit=90,
        packages=WHOLE,
    ),
)
BY_NAME = {part.name: part for part in PARTS}
