"""Facts about the installed torch that need not load it, which takes seconds."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def why_no_gpu() -> str | None:
    """Return why torch cannot find a GPU on any machine: it is built without; None: it has to be asked."""
    spec = find_spec("torch")
    if "torch" in sys.modules or spec is None or spec.origin is None:
        return None

    version_file = Path(spec.origin).with_name("version.py")
    try:
        facts = runpy.run_path(str(version_file))
    except OSError:
        return None

    is_for_cpu = "cuda" in facts and facts["cuda"] is None and facts.get("hip") is None
    return "this torch build has no CUDA" if is_for_cpu else None
