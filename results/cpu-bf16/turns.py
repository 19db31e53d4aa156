"""Trains in float32 and in bf16 by turns, on one thread: processor time of a step of 4 x 256 tokens, and its ratio.

python results/cpu-bf16/turns.py 1_000_000 transformer mamba mamba2
"""

import json
import statistics
import sys
import time

import torch
from crossover import build
from crossover.train.config import OptimConfig
from crossover.train.learner import Learner, Update
from crossover.train.objectives.next_token import RandomTokens
from crossover.train.optim import adamw
from crossover.train.record import cpu_model
from crossover.train.runtime import bf16_speedup, choose_precision, keep_freed_memory

CPU, ROUNDS = torch.device("cpu"), 5
n_params, names = int(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
keep_freed_memory()
for name in names:
    lm, config = build(name, n_params=n_params, vocab_size=256), OptimConfig()
    objective = RandomTokens(vocab_size=256, batch_size=4, seq_len=256)
    batch, optimizer = objective.collate(objective.rows(0)), adamw(lm, config)
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(1 + ROUNDS):
        for precision, times in seconds.items():
            chosen = choose_precision(precision, CPU)
            update = Update(Learner(lm, objective), objective, optimizer, precision=chosen, clip=config.clip)
            start = time.process_time()
            update([batch], 0.0)
            times.append(time.process_time() - start)
    steps = {precision: statistics.median(times[1:]) for precision, times in seconds.items()}
    products = bf16_speedup(min(256, lm.config.d_model))
    found = {"arch": name, "n_params": lm.n_params, "d_model": lm.config.d_model, "cpu_seconds_per_step": steps}
    found |= {"speedup": steps["fp32"] / steps["bf16"], "speedup_of_products": products}
    print(json.dumps(found | {"cpu": cpu_model(), "torch": torch.__version__}), flush=True)
