"""The parts of the measurement, in order of worth: what a command that ends early lacks is what matters least.

Nothing heavy is imported here: the parts themselves are, each in a process of its own.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec

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
    needs_gpu: bool = False
    options: dict = field(default_factory=dict)

    def obstacle(self, device_type: str) -> str:
        """Return why the part cannot run here; empty if nothing is known to be in its way."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.needs_gpu and device_type != "cuda":
            return f"needs a GPU, the device is {device_type}"
        return ""


PARTS = (
    Part("where", "machine", "where", "The machine: bandwidth and products", 40, ("torch", "psutil")),
    Part("waits", "checks", "waits", "Optimizer steps in which the host waits for the GPU", 50, TRAINED, True),
    Part(
        "step_bf16",
        "steps",
        "step",
        "A micro-batch in bf16: forward and backward",
        70,
        LEARNED,
        options={"precision": "bf16"},
    ),
    Part("head_bf16", "heads", "head", "The student's head in bf16", 60, LEARNED, options={"precision": "bf16"}),
    Part("train_bf16", "runs", "train", "train.py in bf16, end to end", 90, WHOLE, options={"precision": "bf16"}),
    Part("forecast", "steps", "forecast", "Memory of training, forecast and counted", 60, WHOLE, True),
    Part(
        "step_fp16",
        "steps",
        "step",
        "A micro-batch in fp16: forward and backward",
        70,
        LEARNED,
        True,
        {"precision": "fp16"},
    ),
    Part("train_fp16", "runs", "train", "train.py in fp16, end to end", 90, WHOLE, True, {"precision": "fp16"}),
    Part("attention", "machine", "attention", "Kernels that attention takes", 30, ("torch", "psutil"), True),
    Part(
        "turing",
        "steps",
        "step",
        "A micro-batch in fp16, the card made to choose as a T4",
        50,
        LEARNED,
        True,
        {"precision": "fp16", "as_t4": True},
    ),
    Part("gradients", "numerics", "gradients", "Gradients beside float64", 30, LEARNED),
    Part("repeat", "runs", "repeat", "The same run again, and continued", 60, WHOLE, options={"deterministic": False}),
    Part(
        "repeat_deterministic",
        "runs",
        "repeat",
        "The same with training.deterministic",
        60,
        WHOLE,
        options={"deterministic": True},
    ),
    Part("tight", "runs", "tight", "Memory that runs out in step 4", 40, WHOLE, True),
    Part(
        "quantised",
        "numerics",
        "quantised",
        "A teacher of few bits",
        60,
        (*LEARNED, "safetensors", "bitsandbytes"),
        True,
    ),
    Part("head_fp16", "heads", "head", "The student's head in fp16", 50, LEARNED, True, {"precision": "fp16"}),
    Part("top_k", "heads", "top_k", "The teacher's largest logits", 20, LEARNED),
    Part("pair", "runs", "real_pair_run", "A real pair, trained for some steps and evaluated", 60, WHOLE),
    Part("verify", "checks", "verify", "verify_fixes.py", 60, WHOLE),
)
BY_NAME = {part.name: part for part in PARTS}
