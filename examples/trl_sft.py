"""A Mamba fine-tuned on prompts and completions by TRL: `pip install trl`, then `python examples/trl_sft.py`.

`register()` gives the class of our models among transformers' own, which SFTTrainer takes like any of them.
"""

import tempfile

import torch
from crossover import build
from crossover.archs.hf import register
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]  # not needed by the tests of the rest


def bytes_as_tokens() -> PreTrainedTokenizerFast:
    """A tokenizer that needs no download."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def main() -> None:
    """Learns to say a word backwards."""
    set_seed(0)
    tokenizer = bytes_as_tokens()
    words = ["cat", "dog", "mat", "log", "sun", "pot", "hat", "net"]
    rows = Dataset.from_list([{"prompt": f"{word} <- ", "completion": word[::-1]} for word in words * 40])
    model = register().of(build("mamba", d_model=64, n_layers=2, vocab_size=len(tokenizer)))
    with tempfile.TemporaryDirectory() as scratch:
        options = SFTConfig(
            scratch,
            max_steps=40,
            learning_rate=5e-3,
            per_device_train_batch_size=16,
            max_length=32,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            log_level="error",
        )
        trainer = SFTTrainer(model, args=options, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token")
    prompt = torch.tensor(tokenizer(["dog <- "])["input_ids"])
    new = model.eval().generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    print(tokenizer.decode(new[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
