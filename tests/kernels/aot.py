"""Compiles the Triton kernels, as they are launched at the sizes of kernels/*/cases.py, for GPUs that need not be here.

    python tests/kernels/aot.py             prints what each costs: registers, stack, shared memory, loops
    python tests/kernels/aot.py --record    and makes that the table that test_aot.py compares with

Launches are recorded with tensors on the meta device, so what is compiled is what runs. TRITON_INTERPRET must be unset.
"""

import argparse
import importlib
import json
import multiprocessing
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
from crossover.kernels.ops import OPS
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


def selective_scan(*, B: int, L: int, E: int, N: int) -> None:
    ops = module("selective_scan")
    u, delta, z = meta(B, L, E), meta(B, L, E), meta(B, L, E)
    inputs = (u, delta, single(E, N), single(B, L, N), single(B, L, N), single(E), z, single(E), True)
    _, state, states = ops.forward(*inputs, None, None, True)
    ops.backward(meta(B, L, E), state, *inputs, None, states)


def ssd(*, B: int, L: int, H: int, P: int, G: int, N: int, train: bool = True) -> None:
    ops = module("ssd")
    x, z, dt = meta(B, L, H, P), meta(B, L, H, P), meta(B, L, H)
    inputs = (x, dt, single(H), meta(B, L, G, N), meta(B, L, G, N), single(H), z, single(H), None, None, True, 0)
    ops.forward(*inputs)
    if train:
        ops.backward(x, None, *inputs)


def attention(*, B: int, L: int, H: int, H_kv: int, P: int, S: int | None = None) -> None:
    ops = module("attention")
    q, k = meta(B, L, H, P), meta(B, S or L, H_kv, P)
    bounds = (None, None, None, True, None, P**-0.5)
    o, lse = ops.forward(q, k, k, *bounds)
    if L > 1:
        ops.backward(o, q, k, k, o, lse, *bounds)


def causal_conv1d(*, B: int, L: int, E: int, K: int) -> None:
    ops = module("causal_conv1d")
    inputs = (meta(B, L, E), None, single(K, E), single(E), True, None)
    ops.backward(ops.forward(*inputs), *inputs)


def state_update(*, B: int, H: int, P: int, N: int, G: int = 1, K: int = 4) -> None:
    channels, state = H * P + 2 * G * N, single(B, H, P, N)
    token = meta(B, channels), meta(B, H), meta(B, K - 1, channels), state
    weights = single(channels, K), single(channels), single(H), single(H), single(H)
    module("state_update").forward(*token, *weights, state)


def rms_norm(*, T: int, D: int, gated: bool = False) -> None:
    ops = module("rms_norm")
    x, z, weight = meta(T, D), meta(T, D) if gated else None, single(D)
    y, rstd = ops.forward(x, z, weight, 1e-5, 1)
    ops.backward(y, x, z, weight, rstd)


def linear_cross_entropy(*, T: int, D: int, V: int) -> None:
    """The kernel between the products, without gradients and with them."""
    ops = module("linear_cross_entropy")
    logits, targets = meta(T, -(-V // 16) * 16)[:, :V], meta(T, dtype=torch.int64)
    ops.rows(logits, targets, -100, None)
    ops.rows(logits, targets, -100, (single(), single()))


def grouped_mm(*, T: int, D: int, F: int, G: int, transposed: bool = False) -> None:
    ops = module("grouped_mm")
    x, y, weight, counts = meta(T, D), meta(T, F), meta(G, F, D), meta(G, dtype=torch.int64)
    if transposed:
        ops.product(y, weight, counts, transposed)
    else:
        ops.product(x, weight, counts)
        ops.weight_gradient(y, x, counts)


def ssm_kernel(*, E: int, N: int, L: int) -> None:
    ops = module("long_conv")
    A = meta(E, N, dtype=torch.complex64)
    ops.kernel_backward(ops.kernel_forward(A, A, L), A, A)


def long_conv(*, B: int, L: int, E: int, dtype: torch.dtype = torch.bfloat16) -> None:
    ops = module("long_conv")
    x, kernel, D = meta(B, E, L, dtype=dtype), single(E, L), single(E)
    y = ops.conv_forward(x, kernel, D)
    ops.input_gradient(y, kernel, D)
    ops.kernel_gradient(y, x)


def ssm_scan(*, B: int, L: int, E: int, N: int) -> None:
    ops = module("long_conv")
    A, h = meta(E, N, dtype=torch.complex64), meta(B, E, N, dtype=torch.complex64)
    inputs = (meta(B, L, E), A, A, single(E), h)
    ops.scan_backward(*ops.scan_forward(*inputs, None), *inputs, meta(B, L, dtype=torch.bool))


def lstm_scan(*, B: int, L: int, E: int) -> None:
    ops = module("lstm_scan")
    weight, h = meta(4 * E, E), single(B, 2, E)
    y, state, activated, cells = ops.forward(meta(B, L, 4 * E), weight, h, None, True)
    ops.backward(y, state, weight, h, None, activated, cells)


def swiglu(*, T: int, F: int) -> None:
    ops = module("swiglu")
    gate, up = meta(T, F), meta(T, F)
    ops.backward(ops.forward(gate, up), gate, up)


def rotary(*, B: int, L: int, H: int, P: int) -> None:
    module("rotary").forward(meta(B, L, H, P), single(L, P // 2), single(L, P // 2))


def case(run: Callable[..., None], op: str, special: str = "", **options: Any) -> Callable[[], None]:
    """A case at the sizes that the operation's own cases give."""
    return lambda: run(**OPS[op].cases.aot_sizes(special), **options)


CASES: dict[str, Callable[[], None]] = {
    "selective_scan": case(selective_scan, "selective_scan"),
    "ssd": case(ssd, "ssd"),
    "ssd, one sequence": case(ssd, "ssd", "one sequence", train=False),
    "attention, 64 wide": case(attention, "attention", "64 wide"),
    "attention, 128 wide": case(attention, "attention", "128 wide"),
    "attention, one query": case(attention, "attention", "one query"),
    "causal_conv1d": case(causal_conv1d, "causal_conv1d"),
    "state_update": case(state_update, "state_update"),
    "ssm_kernel": case(ssm_kernel, "ssm_kernel"),
    "long_conv": case(long_conv, "long_conv"),
    "long_conv, float32": case(long_conv, "long_conv", "float32", dtype=torch.float32),
    "ssm_scan": case(ssm_scan, "ssm_scan"),
    "lstm_scan": case(lstm_scan, "lstm_scan"),
    "rms_norm": case(rms_norm, "rms_norm"),
    "gated_rms_norm": case(rms_norm, "gated_rms_norm", gated=True),
    "swiglu": case(swiglu, "swiglu"),
    "rotary": case(rotary, "rotary"),
    "linear_cross_entropy": case(linear_cross_entropy, "linear_cross_entropy"),
    "grouped_mm": case(grouped_mm, "grouped_mm"),
    "grouped_mm, gradient of x": case(grouped_mm, "grouped_mm", transposed=True),
}
"""Operations at the sizes of their cases, forward and backward, in bfloat16 where the case does not say otherwise."""


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
    """Makes what Triton's launcher would compile for these arguments."""
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
    # compilers have threads and locks of their own, which a fork may find in any state
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(costs_of, range(len(list(launches())))))
    return {name: value for by_name in found for name, value in by_name.items()}


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
