"""Models to and from Hugging Face: `from_hf(folder)`, `to_hf(lm, folder)`, and `register()` for those it does not have.

    lm = from_hf("gpt2/")           # a folder with config.json and model.safetensors; transformers is not needed
    to_hf(lm, "gpt2-again/")        # transformers.AutoModelForCausalLM.from_pretrained("gpt2-again/")

Architectures that both have go under Hugging Face's own names: GPT-2, Llama, Mamba, Mamba-2, Jamba and BERT.
"""

from .auto import register
from .checkpoint import from_hf, to_hf
from .families import FAMILIES

__all__ = ["FAMILIES", "from_hf", "register", "to_hf"]
