"""Any of our decoders as a model of transformers', under a `model_type` of its own."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def register() -> type[Any]:
    """Makes transformers' AutoConfig, AutoModel and AutoModelForCausalLM know `model_type` "crossover".

    Returns the class, CrossoverForCausalLM. `register().of(lm)` shares the parameters of `lm`, trains under Trainer and
    others that take models of transformers', and generates with our state as its cache; its `save_pretrained(folder)`
    writes what `AutoModelForCausalLM.from_pretrained` reads in any process that has called `register`. TRL's SFTTrainer
    makes a loss of its own, in which the auxiliary losses of experts have no part.

    Raises:
        ImportError: if transformers is not installed.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .causal_lm import CrossoverConfig, CrossoverForCausalLM, CrossoverModel

    AutoConfig.register("crossover", CrossoverConfig)
    AutoModel.register(CrossoverConfig, CrossoverModel)
    AutoModelForCausalLM.register(CrossoverConfig, CrossoverForCausalLM)
    return CrossoverForCausalLM
