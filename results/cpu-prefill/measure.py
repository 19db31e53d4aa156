"""Reads a prompt into a model of 10M parameters on one thread: processor time and peak memory, one process a length.

    for n in 2048 8192 32768 131072; do python results/cpu-prefill/measure.py mamba $n; done

Processor time, unlike that of the clock, does not depend on what else a shared machine does.
"""

import json
import sys
import time

import torch
from crossover import build
from crossover.train.record import cpu_model
from crossover.train.runtime import PeakMemory, keep_freed_memory

name, length = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
keep_freed_memory()
toy = build(name, d_model=64, n_layers=2, vocab_size=256)
toy.prefill(torch.zeros(1, 256, dtype=torch.int64), toy.init_state(1, 256))  # compiles what is compiled
memory = PeakMemory(torch.device("cpu"))  # from here on all is the model's
lm = build(name, n_params=10_000_000, vocab_size=256).eval()
tokens = torch.randint(256, (1, length))
start = time.process_time()
lm.prefill(tokens, lm.init_state(1, length))
seconds = time.process_time() - start
found = {"arch": name, "tokens": length, "cpu_seconds": seconds, "peak_bytes": memory.peak_bytes()}
print(json.dumps(found | {"n_params": lm.n_params, "cpu": cpu_model(), "torch": torch.__version__}))
