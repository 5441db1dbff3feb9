"""A CUDA device for a torch that has none: tensors are plain, on `cuda:N`, with real values in the host's memory.

    install("T4", count=2)      # before torch is imported, in a process of its own; then device="cuda" works

`pretended_cuda.cpp` is compiled on first use. Autograd, AutocastCUDA, GradScaler, optimizers and DDP are torch's own.
Not shown: CUDA's own kernels (their rounding, speed, determinism), streams and races, NCCL, bitsandbytes.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("pretended_cuda.cpp")
COMPILER = "g++"
CONTEXT = 350 * 2**20
"""Bytes that a CUDA context takes of a card."""
USABLE = 0.93
"""Share of a card's memory that programs find free."""


@dataclass(frozen=True)
class Card:
    """A GPU as torch describes it."""

    name: str
    capability: tuple[int, int]
    gib: int

    @property
    def bytes(self) -> int:
        return int(self.gib * 2**30 * USABLE)


CARDS = {
    "P100": Card("Tesla P100-PCIE-16GB", (6, 0), 16),
    "T4": Card("Tesla T4", (7, 5), 16),
    "3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 24),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 80),
}


class CannotBuild(Exception):
    """There is no compiler, or torch's headers do not fit the source."""


# ------------------------------------------------------------------------------------------------ building


def build(cache: Path | None = None) -> Path:
    """Compile the device, once for each torch, and return the library.

    Args:
        cache: folder of the library; None: in the user's cache.

    Raises:
        CannotBuild: with the reason.
    """
    if shutil.which(COMPILER) is None:
        raise CannotBuild(f"there is no {COMPILER} to compile the pretended CUDA device with")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    parts = (SOURCE.read_bytes(), str(torch_folder).encode(), (torch_folder / "version.py").read_bytes())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "curriculum_distillation_tests"
    library = cache / f"pretended_cuda_{key}.so"
    if library.exists():
        return library

    # compiled aside and moved: whoever compiles at the same time does no harm
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / library.name
        done = subprocess.run(_command(torch_folder, made), capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
            raise CannotBuild(f"{COMPILER} cannot compile the pretended CUDA device for this torch: {errors[0]}")
        os.replace(made, library)
    return library


def _command(torch_folder: Path, made: Path) -> list[str]:
    includes = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
    libraries = torch_folder / "lib"
    return [
        COMPILER,
        *("-std=c++20", "-O1", "-w", "-shared", "-fPIC"),
        *(f"-I{folder}" for folder in includes),
        str(SOURCE),
        *("-o", str(made)),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"),
    ]


# ------------------------------------------------------------------------------------------------ the device

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)


class Device:
    """The pretended GPUs of this process; `install` makes the only one."""

    def __init__(self, library: Path) -> None:
        self.card, self.count = CARDS["T4"], 1
        self.debug_mode = "default"
        self.kernels: Counter[str] = Counter()
        """Calls of attention, by the kernel that a card would have taken."""
        self._listeners: list[list[tuple[str, str]]] = []
        self._library = ctypes.CDLL(str(library))
        for name in ("pretend_now", "pretend_peak"):
            getattr(self._library, name).restype = ctypes.c_long
        self._library.pretend_capacity.argtypes = [ctypes.c_long]
        self._on_wait = _Callback(self._wait)
        self._library.pretend_on_wait(self._on_wait)

    def become(self, card: str, count: int = 1) -> None:
        """Be `count` GPUs of another kind from now on; tensors must not be left on a GPU that goes."""
        self.card, self.count = CARDS[card], count
        self.kernels.clear()
        self._library.pretend_devices(count)
        self._library.pretend_set_device(0)
        self.limit(None)

    def limit(self, size: int | None) -> None:
        """Let each GPU have so many bytes; None: what its kind has."""
        self._library.pretend_capacity(self.card.bytes if size is None else size)

    def held(self, index: int = 0) -> int:
        """Return the bytes that are allocated."""
        return self._library.pretend_now(index)

    def peak(self, index: int = 0) -> int:
        """Return the most bytes that were allocated at a time."""
        return self._library.pretend_peak(index)

    def reset_peak(self, index: int = 0) -> None:
        self._library.pretend_reset_peak(index)

    def current(self) -> int:
        return self._library.pretend_get_device()

    def choose(self, index: int) -> None:
        self._library.pretend_set_device(index)

    @contextmanager
    def watched(self) -> Iterator[list[tuple[str, str]]]:
        """A list that gets (what the host waited for, where) meanwhile."""
        waits: list[tuple[str, str]] = []
        self._listeners.append(waits)
        try:
            yield waits
        finally:
            self._listeners.remove(waits)

    def _wait(self, why: bytes) -> int:
        for listener in self._listeners:
            listener.append((why.decode(), _caller()))
        return int(self.debug_mode == "error" and b"not pinned" not in why)


def _caller() -> str:
    """Return the line of this project, or else of a library, that made the host wait."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent != SOURCE.parent]
    if not frames:
        return "a thread of torch's own"
    ours = [frame for frame in frames if not any(part in frame.filename for part in ("-packages", "<", "/lib/python"))]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"


# ------------------------------------------------------------------------------------------------ torch.cuda


def install(card: str = "T4", count: int = 1) -> Device:
    """Make torch believe in `count` GPUs of a kind. Call it before torch is imported.

    Raises:
        CannotBuild: see `build`.
    """
    assert "torch" not in sys.modules, "before torch: it asks for the hooks of CUDA once"
    device = Device(build())
    device.become(card, count)

    import torch

    for name, function in {**_properties(device), **_memory(device), **_state(device)}.items():
        setattr(torch.cuda, name, function)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.version.cuda = "12.6"
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # what torch's compiler imports where it sees a GPU
    torch.nn.functional.scaled_dot_product_attention = _attention(device)
    return device


def _index(device: Device, place: Any) -> int:
    import torch

    if isinstance(place, int):
        return place
    index = None if place is None else torch.device(place).index
    return device.current() if index is None else index


def _properties(device: Device) -> dict[str, Callable]:
    """Answers of torch.cuda about the cards."""

    def describe(_: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=device.card.name,
            major=device.card.capability[0],
            minor=device.card.capability[1],
            total_memory=device.card.bytes,
            multi_processor_count=40,
            warp_size=32,
            is_integrated=False,
            gcnArchName="",
        )

    return {
        "is_available": lambda: True,
        "device_count": lambda: device.count,
        "get_device_name": lambda _=None: device.card.name,
        "get_device_capability": lambda _=None: device.card.capability,
        "get_device_properties": describe,
        "get_arch_list": lambda: ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
        "is_bf16_supported": lambda including_emulation=True: device.card.capability >= (8, 0) or including_emulation,
    }


def _memory(device: Device) -> dict[str, Callable]:
    """Answers of torch.cuda about memory; its allocator keeps nothing in reserve here."""

    def held(place: Any = None) -> int:
        return device.held(_index(device, place))

    def peak(place: Any = None) -> int:
        return device.peak(_index(device, place))

    return {
        "mem_get_info": lambda place=None: (device.card.bytes - CONTEXT - held(place), device.card.bytes),
        "memory_allocated": held,
        "memory_reserved": held,
        "max_memory_allocated": peak,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": lambda place=None: device.reset_peak(_index(device, place)),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
    }


def _state(device: Device) -> dict[str, Callable]:
    """Current device, generators (the host's), streams (one after the other) and the watch for synchronisation."""
    import torch

    class Stream:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.device = torch.device("cuda", device.current())

        def __getattr__(self, name: str) -> Callable:
            return lambda *_, **__: None

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *failure: object) -> None: ...

    def exchange(index: int) -> int:
        before = device.current()
        if index >= 0:
            device.choose(index)
        return before

    get_state, set_state = torch.get_rng_state, torch.set_rng_state

    def seed(number: int) -> None:
        torch.default_generator.manual_seed(int(number))

    def watch(mode: str) -> None:
        device.debug_mode = mode

    return {
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "current_device": device.current,
        "set_device": lambda place: device.choose(_index(device, place)),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "synchronize": lambda place=None: device._wait(b"torch.cuda.synchronize") and None,
        "get_rng_state": lambda place="cuda": get_state(),
        "set_rng_state": lambda state, place="cuda": set_state(state),
        "get_rng_state_all": lambda: [get_state() for _ in range(device.count)],
        "set_rng_state_all": lambda states: set_state(states[0]),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "set_sync_debug_mode": watch,
        "get_sync_debug_mode": lambda: {"default": 0, "warn": 1, "error": 2}[device.debug_mode],
        "is_current_stream_capturing": lambda: False,
        "Stream": Stream,
        "Event": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda place=None: Stream(),
        "default_stream": lambda place=None: Stream(),
    }


def _attention(device: Device) -> Callable:
    """`scaled_dot_product_attention` with the kernel that the card would take, as far as the CPU has one like it."""
    import torch

    from tests.gpu.attention_kernels import CUDNN_OR_FLASH, MATH, AttentionCall, choose_kernel

    as_shipped = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if not query.is_cuda:
            return as_shipped(query, key, value, **options, enable_gqa=enable_gqa)

        call = AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        kernel = choose_kernel(device.card.capability, call)
        device.kernels[kernel] += 1
        if kernel == MATH or dropout_p or (attn_mask is not None and attn_mask.requires_grad):
            return as_shipped(query, key, value, **options, enable_gqa=enable_gqa)
        states = _fused(call, scale)
        if kernel == CUDNN_OR_FLASH and attn_mask is not None and attn_mask.dtype == torch.bool:
            return states.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)  # as cuDNN is reported to do
        return states

    return attend


def _fused(call: Any, scale: float | None) -> Any:
    """Return what a kernel that writes no scores computes: the CPU's flash attention."""
    import torch

    query, key, value, mask = call.query.to(call.dtype), call.key.to(call.dtype), call.value.to(call.dtype), call.mask
    if (times := query.shape[1] // key.shape[1]) > 1:
        key, value = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (key, value))
    if mask is not None and mask.dtype == torch.bool:
        nothing = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        mask = nothing.masked_fill(~mask, -torch.inf)

    with torch.autocast("cuda", enabled=False):
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return attend(query, key, value, 0.0, call.is_causal, attn_mask=mask, scale=scale)[0]
