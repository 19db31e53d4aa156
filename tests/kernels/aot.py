"""Compiles the Triton kernels, as they are launched at standard shapes, for GPUs that need not be here.

    python tests/kernels/aot.py             prints what each costs: registers, stack, shared memory, loops
    python tests/kernels/aot.py --record    and makes that the table that test_aot.py compares with

Launches are recorded with tensors on the meta device, so what is compiled is what runs. TRITON_INTERPRET must be unset.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from crossover.kernels.triton_kernels import Launch, record_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE = Path(__file__).with_name("aot.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90)
LOOP = 24
"""Fewest instructions of a loop that is reported; shorter ones are set-up."""

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def single(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.float32)


def module(op: str) -> Any:
    return importlib.import_module(f"crossover.kernels.{op}.triton_kernels")


def selective_scan(batch: int = 8, L: int = 2048, E: int = 2048, N: int = 16) -> None:
    ops = module("selective_scan")
    u, delta, z = meta(batch, L, E), meta(batch, L, E), meta(batch, L, E)
    inputs = (u, delta, single(E, N), single(batch, L, N), single(batch, L, N), single(E), z, single(E), True)
    _, state, states = ops.forward(*inputs, None, None, True)
    ops.backward(meta(batch, L, E), state, *inputs, None, states)


def ssd(batch: int = 8, L: int = 2048, H: int = 32, P: int = 64, G: int = 1, N: int = 128, train: bool = True) -> None:
    ops = module("ssd")
    x, z, dt = meta(batch, L, H, P), meta(batch, L, H, P), meta(batch, L, H)
    B, C = meta(batch, L, G, N), meta(batch, L, G, N)
    inputs = (x, dt, single(H), B, C, single(H), z, single(H), None, None, True, 0)
    ops.forward(*inputs)
    if train:
        ops.backward(x, None, *inputs)


def attention(head_dim: int, L: int = 4096, S: int = 4096, n_kv_heads: int = 16) -> None:
    ops = module("attention")
    q, k = meta(4, L, 16, head_dim), meta(4, S, n_kv_heads, head_dim)
    bounds = (None, None, None, True, None, head_dim**-0.5)
    o, lse = ops.forward(q, k, k, *bounds)
    if L > 1:
        ops.backward(o, q, k, k, o, lse, *bounds)


def causal_conv1d(batch: int = 8, L: int = 2048, E: int = 2048, K: int = 4) -> None:
    ops = module("causal_conv1d")
    inputs = (meta(batch, L, E), None, single(K, E), single(E), True, None)
    ops.backward(ops.forward(*inputs), *inputs)


def state_update(batch: int = 64, H: int = 32, P: int = 64, G: int = 1, N: int = 128, K: int = 4) -> None:
    channels, state = H * P + 2 * G * N, single(batch, H, P, N)
    token = meta(batch, channels), meta(batch, H), meta(batch, K - 1, channels), state
    weights = single(channels, K), single(channels), single(H), single(H), single(H)
    module("state_update").forward(*token, *weights, state)


def rms_norm(T: int = 16384, D: int = 2048, gated: bool = False) -> None:
    ops = module("rms_norm")
    x, z, weight = meta(T, D), meta(T, D) if gated else None, single(D)
    y, rstd = ops.forward(x, z, weight, 1e-5, 1)
    ops.backward(y, x, z, weight, rstd)


def linear_cross_entropy(T: int = 2048, V: int = 50257) -> None:
    ops = module("linear_cross_entropy")
    logits, targets = meta(T, -(-V // 16) * 16)[:, :V], meta(T, dtype=torch.int64)
    ops.rows(logits, targets, -100, None)
    ops.rows(logits, targets, -100, (single(), single()))


def grouped_mm(T: int = 32768, D: int = 1024, F: int = 5632, G: int = 16, transposed: bool = False) -> None:
    ops = module("grouped_mm")
    x, y, weight, counts = meta(T, D), meta(T, F), meta(G, F, D), meta(G, dtype=torch.int64)
    if transposed:
        ops.product(y, weight, counts, transposed)
    else:
        ops.product(x, weight, counts)
        ops.weight_gradient(y, x, counts)


def ssm_kernel(E: int = 2048, N: int = 32, length: int = 2048) -> None:
    ops = module("long_conv")
    A = meta(E, N, dtype=torch.complex64)
    ops.kernel_backward(ops.kernel_forward(A, A, length), A, A)


def long_conv(batch: int = 8, L: int = 2048, E: int = 2048, dtype: torch.dtype = torch.bfloat16) -> None:
    ops = module("long_conv")
    x, kernel, D = meta(batch, E, L, dtype=dtype), single(E, L), single(E)
    y = ops.conv_forward(x, kernel, D)
    ops.input_gradient(y, kernel, D)
    ops.kernel_gradient(y, x)


def ssm_scan(batch: int = 8, L: int = 2048, E: int = 2048, N: int = 32) -> None:
    ops = module("long_conv")
    A, h = meta(E, N, dtype=torch.complex64), meta(batch, E, N, dtype=torch.complex64)
    inputs = (meta(batch, L, E), A, A, single(E), h)
    ops.scan_backward(*ops.scan_forward(*inputs, None), *inputs, meta(batch, L, dtype=torch.bool))


def lstm_scan(batch: int = 64, L: int = 2048, E: int = 512) -> None:
    ops = module("lstm_scan")
    weight, h = meta(4 * E, E), single(batch, 2, E)
    y, state, activated, cells = ops.forward(meta(batch, L, 4 * E), weight, h, None, True)
    ops.backward(y, state, weight, h, None, activated, cells)


def swiglu(T: int = 16384, F: int = 5632) -> None:
    ops = module("swiglu")
    gate, up = meta(T, F), meta(T, F)
    ops.backward(ops.forward(gate, up), gate, up)


def rotary(batch: int = 8, L: int = 2048, H: int = 16, P: int = 128) -> None:
    module("rotary").forward(meta(batch, L, H, P), single(L, P // 2), single(L, P // 2))


CASES: dict[str, Callable[[], None]] = {
    "selective_scan": selective_scan,
    "ssd": ssd,
    "ssd, one sequence": lambda: ssd(batch=1, L=8192, H=24, train=False),
    "attention, 64 wide": lambda: attention(64),
    "attention, 128 wide": lambda: attention(128),
    "attention, one query": lambda: attention(128, L=1, S=8192, n_kv_heads=4),
    "causal_conv1d": causal_conv1d,
    "state_update": state_update,
    "ssm_kernel": ssm_kernel,
    "long_conv": long_conv,
    "long_conv, float32": lambda: long_conv(L=512, dtype=torch.float32),
    "ssm_scan": ssm_scan,
    "lstm_scan": lstm_scan,
    "rms_norm": rms_norm,
    "gated_rms_norm": lambda: rms_norm(gated=True),
    "swiglu": swiglu,
    "rotary": rotary,
    "linear_cross_entropy": linear_cross_entropy,
    "grouped_mm": grouped_mm,
    "grouped_mm, gradient of x": lambda: grouped_mm(transposed=True),
}
"""Operations at standard shapes, forward and backward, in bfloat16 where the case does not say otherwise."""


def launches() -> Iterator[tuple[str, Launch]]:
    """Every kernel that the cases launch, by name; once where equal."""
    seen = set()
    for case, run in CASES.items():
        with record_launches() as recorded:
            run()
        for launch in recorded:
            name = f"{case}: {launch.kernel.fn.__name__.strip('_')}"
            made = source(launch)
            if (key := (name, str(made.signature), str(made.constants))) not in seen:
                seen.add(key)
                count = sum(name == other for other, *_ in seen)
                yield name if count == 1 else f"{name} {count}", launch


def source(launch: Launch) -> ASTSource:
    """What Triton's launcher would compile for these arguments."""
    constants = {k: v for k, v in launch.options.items() if k not in ("num_warps", "num_stages")}
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constexprs[i,] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def cost(launch: Launch, architecture: int) -> dict[str, Any]:
    """Registers, bytes of stack (spills), shared memory, instructions in all and in each loop, the longest first."""
    options = {k: launch.options[k] for k in ("num_warps", "num_stages") if k in launch.options}
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source(launch), target=target, options=options | {"enable_fp_fusion": True})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    n_instructions, loops = _loops(assembly)
    return {
        "registers": registers,
        "stack": stack + local,
        "shared": compiled.metadata.shared,
        "instructions": n_instructions,
        "loops": sorted((n for n in loops if n >= LOOP), reverse=True),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _loops(assembly: str) -> tuple[int, list[int]]:
    """The number of instructions, and of those between each backward branch and its target."""
    n, labels, loops = 0, {}, []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = n
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", line):
            target = re.search(r"(\.L_x_\d+)", instruction[2])
            if instruction[1].startswith("BRA") and target and labels.get(target[1], n) < n:
                loops.append(n - labels[target[1]] + 1)
            n += 1
    return n, loops


def costs_of(index: int) -> dict[str, dict[str, Any]]:
    """The costs of one launch on each architecture."""
    name, launch = list(launches())[index]
    return {f"{name}, sm_{architecture}": cost(launch, architecture) for architecture in ARCHITECTURES}


def costs() -> dict[str, dict[str, Any]]:
    """The costs of every launch."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(costs_of, range(len(list(launches())))))
    return {name: value for one in found for name, value in one.items()}


def main() -> None:
    """Prints the costs as JSON lines."""
    parser = argparse.ArgumentParser(description="Compiles the Triton kernels for GPUs that need not be here.")
    parser.add_argument("--record", action="store_true", help=f"write {TABLE.name}")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    table = {"triton": triton.__version__, "kernels": costs()}
    print(f'{{"triton": "{triton.__version__}", "kernels": {{')
    print(",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in table["kernels"].items()))
    print("}}")
    if asked.record:
        why = json.loads(TABLE.read_text())["why_stack"] if TABLE.exists() else {}
        lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table["kernels"].items())
        TABLE.write_text(
            f'{{\n "triton": "{triton.__version__}",\n "why_stack": {json.dumps(why, indent=2)},\n "kernels": {{\n'
            + ",\n".join(lines)
            + "\n }\n}\n"
        )


if __name__ == "__main__":
    main()
