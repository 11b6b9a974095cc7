"""Put a fast BLAS under MLX on Linux CPUs.

The Linux CPU wheels of MLX carry the reference BLAS, which multiplies float32 matrices about ninety times slower than
OpenBLAS does. NumPy's wheels carry OpenBLAS, under other symbol names and with 64-bit integers. This module builds a
three-line bridge with the C compiler and loads it before MLX, so that MLX resolves `cblas_sgemm` to OpenBLAS.
Without it, results are the same up to rounding; only the speed differs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_BRIDGE = """
#include <stdint.h>
typedef int64_t L;
void scipy_cblas_sgemm64_(int, int, int, L, L, L, float, const float *, L, const float *, L, float, float *, L);
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
    scipy_cblas_sgemm64_(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""


def load(threads: int | None = None) -> str | None:
    """Load the bridge; call it before the first import of MLX. Returns why not, or None when it is in place.

    `threads` bounds the threads of one matrix product; the default is one for each core.
    """
    if sys.platform != "linux":
        return "not needed on this system"
    if "mlx.core" in sys.modules:
        return "MLX is loaded already"
    compiler = shutil.which("cc") or shutil.which("gcc")
    numpy = importlib.util.find_spec("numpy")
    if compiler is None or numpy is None or numpy.origin is None:
        return "it takes NumPy and a C compiler"
    found = sorted((Path(numpy.origin).parent.parent / "numpy.libs").glob("libscipy_openblas64_*.so"))
    if not found:
        return "this NumPy carries no OpenBLAS"
    with tempfile.TemporaryDirectory() as folder:
        source, bridge = Path(folder, "bridge.c"), Path(folder, "bridge.so")
        source.write_text(_BRIDGE, encoding="utf-8")
        command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(bridge), str(found[0]),
                   f"-Wl,-rpath,{found[0].parent}"]  # fmt: skip
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            return f"the compiler failed: {built.stderr.strip()[-200:]}"
        try:
            library = ctypes.CDLL(str(bridge), mode=ctypes.RTLD_GLOBAL)
            if threads is not None:
                library.scipy_openblas_set_num_threads64_(threads)
        except OSError as error:
            return str(error)
    return None
