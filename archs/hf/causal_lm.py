"""Our decoders as models of transformers': their arguments, outputs, loss and generation, with our states as the cache.

Needs transformers. `register` of auto.py makes its AutoConfig, AutoModel and AutoModelForCausalLM know these classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from ..config import ModelConfig
from ..model import Backbone, LanguageModel
from ..state import State, States

__all__ = ["CrossoverConfig", "CrossoverForCausalLM", "CrossoverModel", "StateCache"]

_SAID_BY_POSITIONS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
"""What collators of packed documents give beside position_ids, for kernels that want the same in another form."""


class CrossoverConfig(PreTrainedConfig):
    """A ModelConfig as a configuration of transformers': `model` says all, the rest repeats it under their names.

    Raises:
        ValueError: if a name of theirs contradicts `model`.
    """

    model_type = "crossover"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # transformers adds lists to it

    model: dict[str, Any] | None = None  # ModelConfig.to_dict()
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for theirs, ours in _THEIR_NAMES.items():
            if self.model is not None:
                value, given = self.model[ours], getattr(self, theirs)
                if given not in (None, value):
                    raise ValueError(f"{theirs}={given} contradicts model.{ours}={value}")
                setattr(self, theirs, value)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: ModelConfig) -> CrossoverConfig:
        """The configuration of a model with this config."""
        return cls(model=config.to_dict())


_THEIR_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "tie_word_embeddings": "tie_embeddings",
}


class StateCache(Cache):
    """The states of a model as `past_key_values`: it starts empty, and grows with what is read.

    As every state, it is consumed by the call that it is passed to, which leaves the state after that call in it; to
    branch, copy.deepcopy it first.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.state = States()
        self.n_seen, self.capacity = 0, 0
        self.reached: Tensor | None = None
        """Position that the next token of each row has in its document, (B,) int64."""

    def make_room(self, backbone: Backbone, batch_size: int, n: int) -> None:
        """Makes the state ready to read `n` tokens more; only this learns the number of rows.

        Raises:
            ValueError: if the cache holds another number of rows, or the model has positions for fewer tokens.
        """
        if self.reached is not None and len(self.reached) != batch_size:
            raise ValueError(f"past_key_values holds {len(self.reached)} rows, and the input has {batch_size}")
        needed = self.n_seen + n
        if self.reached is not None and needed <= self.capacity:
            return
        most = backbone.config.max_positions
        # twice what is needed, so that all copying together costs as much as one reading
        self.capacity = max(needed, 2 * needed if most is None else min(2 * needed, most))
        empty = backbone.init_state(batch_size, self.capacity)
        if self.reached is None:
            self.state = empty
            self.reached = torch.zeros(batch_size, dtype=torch.int64, device=next(backbone.parameters()).device)
        else:
            grown = (
                None if old is None else _moved_into(room, old) for room, old in zip(empty, self.state, strict=True)
            )
            self.state = States(grown, empty.wide)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.n_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit but the model's own positions."""
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, (n,) int64, with repeats allowed."""
        if self.reached is not None:
            self.state = self.state.select(indices)
            self.reached = self.reached[indices.to(self.reached.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See batch_select_indices: for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        if self.reached is not None:
            self.batch_select_indices(torch.arange(len(self.reached)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what a recurrence has read it cannot take back."""
        raise ValueError("a crossover model cannot take tokens back out of its state: copy past_key_values before")

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first are read."""
        return -1 if self.reached is None else len(self.reached)

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.reached is not None

    @property
    def is_compileable(self) -> bool:
        """No: its tensors are replaced."""
        return False

    @property
    def is_croppable(self) -> bool:
        """No: see crop."""
        return False

    def __len__(self) -> int:
        return len(self.state)


@dataclass
class CrossoverOutput(BaseModelOutputWithPast):
    """What CrossoverModel returns."""

    aux_loss: Tensor | None = None
    """Sum of the layers' auxiliary losses, a scalar."""


class CrossoverPreTrainedModel(PreTrainedModel):
    """What both classes share: the LanguageModel as `lm`, and what follows from it."""

    config_class = CrossoverConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  # declared as lists there
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _is_stateful = True  # so that transformers refuses what would take tokens back, such as assisted generation

    lm: LanguageModel

    @classmethod
    def of(cls, lm: LanguageModel) -> Any:
        """A model that shares the parameters of `lm`.

        Raises:
            ValueError: if it is no decoder.
        """
        return cls(CrossoverConfig.of(lm.config), lm).train(lm.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """See PreTrainedModel.from_pretrained.

        Raises:
            ValueError: if tensors are missing or unexpected, where transformers would warn and go on.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, report = loaded
        problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
        problems += [f"{name} is not expected" for name in sorted(report["unexpected_keys"])]
        if problems:
            raise ValueError(f"the tensors do not fit config.json: {'; '.join(problems)}")
        return (model, report) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Every class of ours has initialized its own."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.lm.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces the embedding."""
        self.lm.embedding = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Makes the vocabulary larger or smaller, and the config follows; a new token gets the mean of the others.

        Args:
            new_num_tokens: of the vocabulary; None keeps it, but for the next argument.
            pad_to_multiple_of: what the number is rounded up to a multiple of.
            mean_resizing: must be true, for no other values are drawn here.

        Returns:
            The embedding.

        Raises:
            ValueError: for mean_resizing=False, or a size below 1.
        """
        if not mean_resizing:
            raise ValueError("mean_resizing=False: new tokens get the mean of the others here, and no random values")
        n = self.lm.config.vocab_size if new_num_tokens is None else new_num_tokens
        n = n if pad_to_multiple_of is None else -(-n // pad_to_multiple_of) * pad_to_multiple_of
        if n != self.lm.config.vocab_size:
            self.lm.resize_embeddings(n)
            self.config.model, self.config.vocab_size = self.lm.config.to_dict(), n
            if (tied := getattr(self, "lm_head", None)) is not None:
                tied.weight, tied.out_features = self.lm.embedding.weight, n
        return self.lm.embedding


class CrossoverModel(CrossoverPreTrainedModel):
    """Tokens to the hidden states from which logits are made."""

    def __init__(self, config: CrossoverConfig, lm: LanguageModel | None = None) -> None:
        super().__init__(config)
        if config.model is None:
            raise ValueError("config.json has no table `model`, which says what the model is")
        described = ModelConfig.from_dict(config.model) if lm is None else lm.config
        if described.kind != "decoder" or described.head != "linear" or described.segments:
            raise ValueError(
                "transformers' causal models are decoders with a linear head and no segments, and this is"
                f" {described.kind} with head={described.head!r} and segments={described.segments}: to_hf writes BERTs,"
                " and lm.save_pretrained any model"
            )
        self.lm = LanguageModel(described) if lm is None else lm
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CrossoverOutput | tuple[Any, ...]:
        """Runs the layers.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), or of all tokens so far; a row is read as if its masked tokens were not there.
            position_ids: (B, L) or (1, L) int64; documents begin where they return to 0.
            past_key_values: the cache of an earlier call.
            inputs_embeds: (B, L, D) in place of input_ids.
            use_cache: whether to return a cache; None means config.use_cache, but never in training.
            output_hidden_states: whether to return the input of the first layer and what each layer makes of it, after
                the last one normed.
            return_dict: False gives a tuple.
            options: refused by name, but for what says nothing.

        Raises:
            ValueError: if an argument is not known, or two contradict each other.
        """
        _refuse(options, beside_positions=position_ids is not None)
        if past_key_values is not None and not isinstance(past_key_values, StateCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, which holds no state of ours: give None, or"
                " the one that this model returned"
            )
        defaults = self.config
        output_hidden_states = defaults.output_hidden_states if output_hidden_states is None else output_hidden_states
        if use_cache is None:
            use_cache = past_key_values is not None or (defaults.use_cache and not self.training)
        if self.gradient_checkpointing and self.training:
            use_cache = False

        x = inputs_embeds
        if input_ids is not None and inputs_embeds is None:
            x = self.lm.embed(input_ids, name="input_ids")
        elif input_ids is not None or x is None:
            raise ValueError("give either input_ids or inputs_embeds")
        cache = past_key_values
        if cache is None and use_cache:
            cache = StateCache()
        if cache is not None:
            cache.make_room(self.lm.backbone, x.shape[0], x.shape[1])
        reached = None if cache is None else cache.reached
        reading = _reading(
            x, attention_mask, position_ids, n_seen=0 if cache is None else cache.n_seen, reached=reached
        )
        with contextlib.ExitStack() as stack:
            hidden_states = stack.enter_context(_recorded(self.lm.backbone)) if output_hidden_states else None
            if self.gradient_checkpointing and self.training:
                stack.enter_context(_checkpointed(self.lm.backbone, self._gradient_checkpointing_func))
            state = None if cache is None else cache.state
            x, state, aux_loss = self.lm.backbone(reading.ordered(x), state, starts=reading.starts)
        if cache is not None:
            cache.state, cache.reached, cache.n_seen = state, reading.reached, cache.n_seen + x.shape[1]
        output = CrossoverOutput(
            last_hidden_state=reading.restored(x),
            past_key_values=cache if use_cache else None,
            hidden_states=None if hidden_states is None else tuple(map(reading.restored, [*hidden_states, x])),
            aux_loss=aux_loss,
        )
        return output if (defaults.return_dict if return_dict is None else return_dict) else output.to_tuple()


class CrossoverForCausalLM(CrossoverPreTrainedModel, GenerationMixin):
    """Tokens to the logits of the next ones, as every causal language model of transformers'."""

    accepts_loss_kwargs = True  # num_items_in_batch, which Trainer then counts
    _tied_weights_keys = {"lm_head.weight": "model.lm.embedding.weight"}  # noqa: RUF012  # declared as a dict there

    def __init__(self, config: CrossoverConfig, lm: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = CrossoverModel(config, lm)
        if self.lm.config.tie_embeddings:  # what others take for the head of a tied model: a module with its weight
            self.lm_head = nn.Linear(self.lm.config.d_model, self.lm.config.vocab_size, bias=False, device="meta")
            self.lm_head.weight = self.lm.embedding.weight
        self.post_init()

    @property
    def lm(self) -> LanguageModel:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The LanguageModel itself."""
        return self.model.lm

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]  # the rest is not needed
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """Gives `generate` our cache, where it would make one of keys and values."""
        if (wanted := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"a crossover model has no cache_implementation={wanted!r}: its state is the cache")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache()

    def _prepare_position_ids_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]  # see there
        self, *_: Any
    ) -> None:
        """None: `generate` would count on after padding on the right, and what counts is the cache."""

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]  # the rest is in kwargs
        self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """See GenerationMixin; moves padding to the left, because the next token follows the last column."""
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        mask = inputs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
            past, new = mask.split([mask.shape[1] - inputs[name].shape[1], inputs[name].shape[1]], dim=1)
            order = _masked_first(new)
            inputs["attention_mask"] = torch.cat([past, new.gather(1, order)], dim=1)
            inputs[name] = _gather(inputs[name], order)
        return inputs

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the logits: a module with `weight` and `bias`."""
        return self.lm_head if self.lm.config.tie_embeddings else self.lm.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replaces the projection to the logits."""
        if self.lm.config.tie_embeddings:
            self.lm_head = new_embeddings
        else:
            self.lm.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss of labels.

        Args:
            input_ids: with the five others up to use_cache, and output_hidden_states, as in CrossoverModel.forward.
            attention_mask: see there.
            position_ids: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: (B, L) int64, the tokens themselves: they are shifted here. -100 is not counted.
            use_cache: see there.
            output_hidden_states: see there.
            return_dict: False gives a tuple.
            logits_to_keep: makes logits of that many last tokens, or of the tokens of these indices; 0 means all.
            num_items_in_batch: labels of the whole update, of which this call may see a part: the sum of the losses of
                all parts is the loss of the whole. None means those of this call. Auxiliary losses count by the share.
            options: see there.

        Returns:
            The loss in nats per label with the layers' auxiliary losses, 0 where no label counts; logits (B, L, V), the
            cache and the hidden states.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        out = self.model(**inputs, **options, output_hidden_states=output_hidden_states, return_dict=True)
        x = out.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            x = x[:, logits_to_keep]
        elif logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = self.get_output_embeddings()(x)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels {tuple(labels.shape)} do not fit logits of {tuple(logits.shape[:2])} tokens: give one for"
                    " each token, and no logits_to_keep"
                )
            loss = _loss(logits, labels, out.aux_loss, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class _Reading(NamedTuple):
    """In what order rows are read, and where their documents begin."""

    order: Tensor | None
    """Indices of the tokens of each row as they are read, (B, L): masked ones first. None where they stay in place."""
    starts: Tensor | None
    """(B, L) bool, in the order of reading, as in Mixer.forward."""
    reached: Tensor | None
    """Position that the next token of each row has in its document, (B,) int64; None where none was given."""

    def ordered(self, x: Tensor) -> Tensor:
        """(B, L, D) in the order of reading."""
        return x if self.order is None else _gather(x, self.order)

    def restored(self, x: Tensor) -> Tensor:
        """(B, L, D) in the order of the input again."""
        return x if self.order is None else _gather(x, self.order.argsort(1))


def _reading(
    x: Tensor, mask: Tensor | None, position_ids: Tensor | None, *, n_seen: int, reached: Tensor | None
) -> _Reading:
    """How to read (B, L, D) after `n_seen` tokens; `reached` is None where nothing is kept."""
    B, L = x.shape[:2]
    before = torch.zeros(B, dtype=torch.int64, device=x.device) if reached is None else reached
    keeps = reached is not None
    if mask is not None and (mask.dim() != 2 or len(mask) != B or mask.shape[1] not in (L, n_seen + L)):
        raise ValueError(f"attention_mask is {tuple(mask.shape)} and should be {(B, n_seen + L)}, one for each token")
    real = None if mask is None else mask[:, -L:].to(x.device).bool()
    if position_ids is None and (real is None or real.all()) and (n_seen == 0 or before.all()):
        return _Reading(None, None, before + L if keeps else None)

    # masked tokens are read first, and forgotten where the row begins: as if they were not there
    real = torch.ones(B, L, dtype=torch.bool, device=x.device) if real is None else real
    n_masked = L - real.sum(1)
    if (n_masked * before).any():
        raise ValueError("attention_mask hides tokens of a row that has begun: a state cannot pass over them")
    index = torch.arange(L, device=x.device)
    order = _masked_first(real) if n_masked.any() else None
    if order is not None and (order == index).all():
        order = None
    is_first = index == n_masked[:, None]
    starts = is_first & (before == 0)[:, None]
    after = before + L - n_masked
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != L:
            raise ValueError(f"position_ids is {tuple(position_ids.shape)} and should be {(B, L)}")
        given = position_ids.to(x.device).expand(B, L)
        given = given if order is None else given.gather(1, order)
        expected = torch.where(is_first, before[:, None], F.pad(given[:, :-1], (1, 0)) + 1)
        is_real = index >= n_masked[:, None]
        if (is_real & (given != 0) & (given != expected)).any():
            raise ValueError("position_ids must count, and return to 0 where a document begins")
        starts |= is_real & (given == 0)
        after = torch.where(n_masked == L, before, given[:, -1] + 1)
    if n_seen == 0:
        starts[:, 0] = False  # there is nothing to forget
    return _Reading(order, starts if starts.any() else None, after if keeps else None)


def _masked_first(mask: Tensor) -> Tensor:
    """Indices, (B, L), that bring what is masked to the front of each row, and keep the order of the rest."""
    return mask.int().argsort(dim=1, stable=True)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, t]], for x (B, L) or (B, L, D)."""
    return x.gather(1, index if x.dim() == 2 else index[..., None].expand_as(x))


def _refuse(options: dict[str, Any], *, beside_positions: bool) -> None:
    """Raises a ValueError for what is not known: an ignored option would change results in silence."""
    harmless = _SAID_BY_POSITIONS if beside_positions else frozenset()
    # "cache_position" counts tokens seen, as the cache does itself; output_attentions=False asks for nothing
    unknown = [
        name
        for name, value in options.items()
        if value is not None and value is not False and name not in harmless | {"cache_position"}
    ]
    if unknown:
        raise ValueError(f"a crossover model does not know {', '.join(unknown)}")


def _loss(logits: Tensor, labels: Tensor, aux_loss: Tensor, n_all: Tensor | int | None) -> Tensor:
    """The part of these labels in the mean over `n_all`, in which auxiliary losses weigh as much as their labels."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).to(logits.device)
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nats = F.cross_entropy(precise.flatten(0, 1), targets.flatten(), reduction="sum")
    n = (targets != -100).sum()
    whole = torch.as_tensor(n if n_all is None else n_all, device=logits.device)
    return (nats + n * aux_loss) / whole.clamp(min=1)


def _moved_into(room: State, old: State) -> State:
    """A state with the values of `old` in larger tensors."""
    grown = {}
    for name, value in old.tensors().items():
        larger = room.tensors().get(name)
        if larger is not None and larger.shape != value.shape:
            larger[tuple(map(slice, value.shape))] = value
            grown[name] = larger
    return dataclasses.replace(old, **grown)


@contextlib.contextmanager
def _recorded(backbone: Backbone) -> Iterator[list[Tensor]]:
    """Collects the input of the first block and the outputs of all but the last."""
    found: list[Tensor] = []
    blocks = list(backbone.blocks)
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, args, out: found.append(out[0])) for block in blocks[:-1]]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _checkpointed(backbone: Backbone, checkpoint: Any) -> Iterator[None]:
    """Blocks run through `checkpoint`, which computes them again in the backward pass."""
    patched = [(block, vars(block).get("forward"), block.forward) for block in backbone.blocks]
    for block, _, forward in patched:
        vars(block)["forward"] = partial(_run_checkpointed, checkpoint, forward)
    try:
        yield
    finally:
        for block, own, _ in patched:
            del vars(block)["forward"]
            if own is not None:
                vars(block)["forward"] = own


def _run_checkpointed(checkpoint: Any, forward: Any, x: Tensor, state: None, **options: Any) -> Any:
    # a closure: reentrant checkpoints pass on no names
    return checkpoint(lambda x: forward(x, state, **options), x)
