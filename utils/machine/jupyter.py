"""The kernel of a Jupyter notebook, in which a run may take place."""

import sys


def in_kernel() -> bool:
    """Return whether this process is the kernel of a notebook, whose cells show HTML; IPython in a terminal is none."""
    # A kernel has loaded IPython itself; nobody else has to wait for it.
    ipython = sys.modules.get("IPython")
    get_shell = getattr(ipython, "get_ipython", None)
    shell = get_shell() if get_shell is not None else None
    return getattr(shell, "kernel", None) is not None
