"""Any of our models as a model of transformers', under a `model_type` of its own."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..config import ModelConfig
from ..model import LanguageModel


@functools.cache
def register() -> type[Any]:
    """Makes transformers' AutoConfig and AutoModelForCausalLM know `model_type` "crossover"; needs transformers.

    Returns the class. `register().of(lm).save_pretrained(folder)` writes what `AutoModelForCausalLM.from_pretrained`
    reads in any process that has called `register`. Generation runs the whole sequence for every token, because caches
    of transformers hold no state of ours: `lm.generate` is faster.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class CrossoverConfig(PreTrainedConfig):
        model_type = "crossover"
        model: dict[str, Any] | None = None  # ModelConfig.to_dict()

    class CrossoverForCausalLM(PreTrainedModel, GenerationMixin):
        config_class = CrossoverConfig
        base_model_prefix = "lm"

        def __init__(self, config: Any, lm: LanguageModel | None = None) -> None:
            super().__init__(config)
            self.lm = LanguageModel(ModelConfig.from_dict(config.model)) if lm is None else lm
            self.generation_config.use_cache = False
            self.post_init()

        @classmethod
        def of(cls, lm: LanguageModel) -> Any:
            """A model that shares the parameters of `lm`."""
            config = lm.config
            options = {"num_hidden_layers": config.n_layers, "tie_word_embeddings": config.tie_embeddings}
            return cls(CrossoverConfig(model=config.to_dict(), **options), lm)

        def _init_weights(self, module: Any) -> None:
            """Every class of ours has initialized its own."""

        def get_input_embeddings(self) -> Any:
            return self.lm.embedding

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **options: Any
        ) -> CausalLMOutput:
            if options.get("past_key_values") is not None:
                raise ValueError("a crossover model keeps no cache of transformers': generate with use_cache=False")
            starts = None
            if attention_mask is not None and not attention_mask.all():
                real = attention_mask.bool()
                starts = real & ~F.pad(real[:, :-1], (1, 0))
            out = self.lm(input_ids, starts=starts)
            loss = None
            if labels is not None:
                nats = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
                loss = nats + out.aux_loss
            return CausalLMOutput(loss=loss, logits=out.logits)

    AutoConfig.register("crossover", CrossoverConfig)
    AutoModelForCausalLM.register(CrossoverConfig, CrossoverForCausalLM)
    return CrossoverForCausalLM
