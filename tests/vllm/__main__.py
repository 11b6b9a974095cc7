"""`poe test-vllm`: the conformance suite and a comparison with MLX, against real vLLM on the CPU.

The model server is the program itself, with the engine vllm, which starts vLLM with the bundled model. Arguments are
passed on to pytest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from model_servers import bundled
from tests.vllm import environment

ROOT = Path(__file__).resolve().parents[2]


def settings(python: Path) -> dict[str, object]:
    """Of the engine. float32 on both sides, so that greedy text can be compared."""
    return {
        "model": str(bundled.path()),
        "python": str(python),
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1"},
        "serve_args": [
            *("--dtype", "float32"),
            *("--block-size", "32"),
            *("--max-num-seqs", "4"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            # A weak model fills JSON with blanks otherwise, until it is cut off.
            *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
            "--enforce-eager",
        ],
    }


def main(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "model_servers", "--engine", "vllm", "--orchestrators", "[]", "--watch-parent"]
    command += ["--server-id", "vllm-tested", "--engine-settings", json.dumps(settings(environment.python()))]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                return server.wait()  # it has said why
            address = json.loads(line)["address"]
            print(f"vLLM serves behind {address}", flush=True)
            options = ["--override-ini=addopts=-ra --import-mode=importlib", f"--endpoint={address}"]
            tests = ["tests/conformance", "tests/vllm", f"--model={bundled.MODEL_NAME}", *arguments]
            return subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT).returncode
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
