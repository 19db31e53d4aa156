"""A Mamba under transformers' Trainer: `pip install transformers accelerate`, then `python examples/hf_trainer.py`.

`register()` gives the class of our models among transformers' own. What it saves, AutoModelForCausalLM loads.
"""

import tempfile
from typing import Any

import torch
from crossover import build
from crossover.archs.hf import register
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

TEXT = b"the cat sat on the mat, and the dog sat on the log. " * 40


def main() -> None:
    """Trains with accumulation, then loads and generates."""
    set_seed(0)
    windows = [list(TEXT[i : i + 64]) for i in range(0, len(TEXT) - 64, 5)]
    rows = Dataset.from_dict({"input_ids": windows, "labels": windows})
    model = register().of(build("mamba", d_model=64, n_layers=2, vocab_size=256))
    with tempfile.TemporaryDirectory() as scratch:
        options = TrainingArguments(
            scratch,
            max_steps=30,
            learning_rate=3e-3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            log_level="error",
        )
        trainer = Trainer(model, options, train_dataset=rows)
        trainer.train()
        trainer.save_model(scratch)
        again: Any = AutoModelForCausalLM.from_pretrained(scratch)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte")
    new = again.generate(torch.tensor([list(b"the cat")]), max_new_tokens=13, do_sample=False)
    print(bytes(new[0].tolist()))


if __name__ == "__main__":
    main()
