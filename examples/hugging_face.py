"""Loads a Hugging Face checkpoint and compares logits: `python examples/hugging_face.py [FOLDER]`.

Without a folder, a tiny Llama with random weights is written first: nothing is downloaded. Any folder that holds the
config.json and model.safetensors of a GPT-2, Llama, Mamba, Mamba-2 or Jamba works as well.
"""

import sys
import tempfile
from pathlib import Path

import torch
from crossover.archs.hf import from_hf, to_hf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def write_tiny_llama(folder: Path) -> None:
    """A model with weights large enough for mistakes to show in the logits."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    """Compares logits, generates, and writes the model back."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch, "llama")
        if len(sys.argv) == 1:
            write_tiny_llama(folder)
        theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), from_hf(folder).eval()
        print(f"{type(theirs).__name__}: {ours.n_params:,} parameters in {ours.config.n_layers} layers")

        tokens = torch.randint(ours.config.vocab_size, (2, 20))
        with torch.no_grad():
            expected, logits = theirs(tokens).logits, ours(tokens).logits
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
        print(f"logits differ by {error:.0e} of the largest")
        assert error < 1e-5, error

        new = ours.generate(tokens[:1], max_new_tokens=8, temperature=0)[0, -8:]
        print(f"ours continues the first row with {new.tolist()}")

        to_hf(ours, Path(scratch, "back"))
        back = AutoModelForCausalLM.from_pretrained(Path(scratch, "back")).eval()
        with torch.no_grad():
            print(f"written back, it gives the same logits: {torch.equal(back(tokens).logits, expected)}")


if __name__ == "__main__":
    main()
