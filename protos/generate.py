"""Generate the Python code of the contract with a pinned compiler.

    python protos/generate.py          # write modelyard/v1/*_pb2*.py(i)
    python protos/generate.py --check  # fail if the committed code is out of date

The compiler is pinned because generated code must never be newer than the
protobuf runtime it meets: code made by grpcio-tools 1.73.1 (protobuf 6.31) runs
on every protobuf from 6.33.5 up to, not including, 8.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.resources
import sys
import tempfile
from pathlib import Path

PINNED = "1.73.1"
ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "modelyard" / "v1"


def generate(out: Path) -> None:
    from grpc_tools import protoc

    installed = importlib.metadata.version("grpcio-tools")
    if installed != PINNED:
        sys.exit(f"grpcio-tools {PINNED} is needed, {installed} is installed: pip install grpcio-tools=={PINNED}")
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{well_known}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *(str(path) for path in sorted(PACKAGE.glob("*.proto"))),
        ]
    )
    if status:
        sys.exit(status)
    # Files without a service yield empty stubs: noise, not code.
    for path in sorted(PACKAGE.glob("*.proto")):
        if "\nservice " not in path.read_text():
            (out / "modelyard" / "v1" / f"{path.stem}_pb2_grpc.py").unlink()


def contents(package: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in package.glob("*_pb2*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        fresh = contents(Path(temporary) / "modelyard" / "v1")
    committed = contents(PACKAGE)
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if check:
        if stale:
            sys.exit(f"out of date: {', '.join(stale)}; run: python protos/generate.py")
        return
    for name in stale:
        if name in fresh:
            (PACKAGE / name).write_text(fresh[name])
        else:
            (PACKAGE / name).unlink()
    print(f"{len(fresh)} files, {len(stale)} changed")


if __name__ == "__main__":
    main()
