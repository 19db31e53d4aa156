"""Prints the processor that numba and PyTorch compute for; with `avx2`, fails unless both hold themselves to AVX2.

Both ignore a limit that they do not know, and tests under it would prove nothing. MKL and oneDNN do not tell theirs.
"""

import sys

import torch
from crossover.kernels.simd import LANES, TARGET


def main() -> str | None:
    system, name, features = TARGET
    vectors = [f for f in features.split(",") if f.startswith(("+avx", "+sse", "+fma", "+neon", "+sve"))]
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"numba: {name} on {system}, {' '.join(vectors)}: {LANES} lanes", f"torch: {capability}", sep="\n", flush=True
    )
    if sys.argv[1:] == ["avx2"] and (LANES, capability) != (8, "AVX2"):
        return "the limit to AVX2 did not take effect: numba should have 8 lanes, and torch the capability AVX2"
    return None


if __name__ == "__main__":
    sys.exit(main())
