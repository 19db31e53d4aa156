"""Our decoders as models of transformers': what its users pass, train, generate, save and load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, ModelConfig, build
from crossover.archs.hf import register
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
transformers.utils.logging.disable_progress_bar()

V = 37
HYBRID: dict[str, Any] = {
    "pattern": ("mamba", "attention+mlp", "local+moe"),
    "mixer": {"local": {"kind": "attention", "window": 3}},
}


def decoder(arch: str = "hybrid", **options: Any) -> LanguageModel:
    fields: dict[str, Any] = {"d_model": 20, "n_layers": 3, "vocab_size": V} | options
    return build(ModelConfig(**(HYBRID | fields))) if arch == "hybrid" else build(arch, **fields)


def gradients(model: torch.nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return [g for g in found if g is not None]


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arch", "tied"), [("h3", False), ("hybrid", True), ("gpt2", False)])
def test_a_model_loads_and_generates_as_ours(arch: str, tied: bool, tmp_path: Path) -> None:
    lm = decoder(arch, tie_embeddings=tied, **({"max_positions": 23} if arch == "gpt2" else {})).eval()
    register().of(lm).save_pretrained(tmp_path)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for name, value in lm.state_dict().items():
        assert torch.equal(model.lm.state_dict()[name], value), name
    assert (model.get_output_embeddings().weight is model.lm.embedding.weight) == tied
    tokens = torch.randint(V, (3, 11))
    body = transformers.AutoModel.from_pretrained(tmp_path)
    assert_close(body(tokens).last_hidden_state, lm.hidden(tokens)[0])

    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **options), lm.generate(tokens, 9, temperature=0))
    by_cache, by_reading_again = (
        model.generate(tokens, num_beams=3, use_cache=use_cache, **options) for use_cache in (True, False)
    )
    assert torch.equal(by_cache, by_reading_again)
    rows = [tokens[0, :4], tokens[1], tokens[2, :7]]
    alone = [row[-9:] for row in lm.generate(rows, 9, temperature=0)]
    for side in ("left", "right"):
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, padding_side=side)
        for use_cache in (True, False):
            found = model.generate(padded, attention_mask=mask, use_cache=use_cache, **options)
            assert torch.equal(found[:, 11:], torch.stack(alone)), side


def test_a_returned_cache_is_read_on_from_in_any_pieces() -> None:
    model = register().of(decoder().eval())
    tokens = torch.randint(V, (2, 19))
    whole = model(tokens).logits
    out, pieces = model(tokens[:, :5], use_cache=True), []
    pieces.append(out.logits)
    for first, last in ((5, 6), (6, 14), (14, 19)):
        out = model(tokens[:, first:last], past_key_values=out.past_key_values)
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), whole)
    assert out.past_key_values.get_seq_length() == 19
    out = model.generate(tokens, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.cat([out.sequences, tokens[:, :3]], 1)
    expected = model.generate(more, max_new_tokens=4, do_sample=False, prefill_chunk_size=5)
    continued = model.generate(more, max_new_tokens=4, do_sample=False, past_key_values=out.past_key_values)
    assert torch.equal(continued, expected)


def test_what_cannot_be_generated_with_is_refused_by_name() -> None:
    model, tokens = register().of(decoder("s4d").eval()), torch.randint(V, (1, 5))
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(tokens, max_new_tokens=3, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(tokens, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        model(tokens, past_key_values=transformers.DynamicCache())
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds 1 rows, and the input has 2"):
        model(tokens.expand(2, -1), past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask hides tokens of a row that has begun"):
        model(tokens, past_key_values=cache, attention_mask=torch.tensor([[1] * 7 + [0] * 3]))


def test_the_losses_of_parts_add_up_to_that_of_the_whole() -> None:
    model = register().of(decoder(ffn={"moe": {"balance_weight": 0.0}}))  # balance is judged within each call
    tokens = torch.randint(V, (6, 13))
    labels = tokens.where(torch.rand(6, 13) > 0.4, -100)
    labels[2] = -100  # a part without any
    n = (labels[:, 1:] != -100).sum()
    whole = model(tokens, labels=labels).loss
    whole.backward()
    expected = gradients(model)
    losses, _ = model.lm.loss(tokens[:, :-1], labels[:, 1:])
    assert_close(whole, losses)
    for size in (1, 2, 3, 6):
        parts = [
            model(t, labels=y, num_items_in_batch=n).loss
            for t, y in zip(tokens.split(size), labels.split(size), strict=True)
        ]
        total = torch.stack(parts).sum()
        total.backward()
        assert_close(total, whole)
        assert_close(gradients(model), expected)


def test_auxiliary_losses_count_by_the_share_of_the_labels() -> None:
    model, tokens = register().of(decoder()), torch.randint(V, (2, 7))
    nats, _ = model.lm.loss(tokens[:, :-1], tokens[:, 1:])
    aux = model.lm(tokens).aux_loss  # which sees the last token too
    assert aux > 0
    assert_close(model(tokens, labels=tokens).loss, nats + aux)
    assert_close(model(tokens, labels=tokens, num_items_in_batch=3 * 12).loss, (nats + aux) / 3)


def test_a_batch_without_labels_that_count_has_loss_zero_and_gradients_of_zero() -> None:
    model, tokens = register().of(decoder()), torch.randint(V, (2, 5))
    loss = model(tokens, labels=torch.full_like(tokens, -100)).loss
    loss.backward()
    assert loss == 0
    assert not any(g.any() for g in gradients(model))


@pytest.mark.parametrize("arch", ["hybrid", "gpt2"])
def test_documents_begin_where_positions_return_to_zero(arch: str) -> None:
    model = register().of(decoder(arch))
    first, second = torch.randint(V, (2, 7)), torch.randint(V, (2, 6))
    packed, positions = torch.cat([first, second], 1), torch.cat([torch.arange(7), torch.arange(6)])[None]
    apart = torch.cat([model(first).logits, model(second).logits], 1)
    apart.square().sum().backward()
    expected = gradients(model)
    together = model(packed, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 7, 13])).logits
    together.square().sum().backward()
    assert_close(together, apart)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-3)  # sums of some hundred squares

    model.eval()
    out = model(packed[:, :9], position_ids=positions[:, :9], use_cache=True)
    rest = model(packed[:, 9:], position_ids=positions[:, 9:], past_key_values=out.past_key_values)
    assert_close(torch.cat([out.logits, rest.logits], 1), apart)
    for wrong in (positions.flip(1), positions + 1, positions.where(positions != 5, 9)):
        with pytest.raises(ValueError, match="position_ids must count, and return to 0"):
            model(packed, position_ids=wrong)


def test_masked_tokens_are_as_if_they_were_not_there() -> None:
    model = register().of(decoder("gpt2"))
    tokens = torch.randint(V, (3, 12))
    mask = torch.ones_like(tokens)
    mask[0, :5] = mask[1, 8:] = mask[2, 4:6] = 0
    found = model(tokens, attention_mask=mask).logits
    for row, kept, logits in zip(tokens, mask.bool(), found, strict=True):
        assert_close(logits[kept], model(row[None, kept]).logits[0])


def test_the_usual_arguments_do_what_they_do_elsewhere() -> None:
    model = register().of(decoder().eval())
    tokens = torch.randint(V, (2, 9))
    assert model(tokens).past_key_values is not None
    assert model.train()(tokens).past_key_values is None
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(out.hidden_states[-1], model.base_model(input_ids=tokens).last_hidden_state)
    assert not torch.equal(out.hidden_states[1], out.hidden_states[2])
    loss, logits = model(tokens, labels=tokens, return_dict=False)
    assert loss.dim() == 0
    assert torch.equal(logits, out.logits)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, logits)
    assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:])
    assert_close(model(tokens, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
    for wrong, message in (
        ({"token_type_ids": tokens}, "does not know token_type_ids"),
        ({"output_attentions": True}, "does not know output_attentions"),
        ({"cu_seq_lens_q": tokens}, "does not know cu_seq_lens_q"),
        ({"inputs_embeds": out.hidden_states[0]}, "either input_ids or inputs_embeds"),
        ({"labels": tokens, "logits_to_keep": 3}, r"labels \(2, 9\) do not fit logits of \(2, 3\) tokens"),
        ({"attention_mask": torch.ones(2, 8)}, r"attention_mask is \(2, 8\) and should be \(2, 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, **wrong)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool) -> None:
    model, tokens = register().of(decoder()), torch.randint(V, (2, 9))
    calls: list[int] = []
    model.lm.backbone.blocks[1].mixer.register_forward_hook(lambda *_: calls.append(1))
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(tokens, labels=tokens).loss.backward()
    assert_close(gradients(model), expected)
    assert len(calls) == 1 + 2
    model.gradient_checkpointing_disable()
    model(tokens, labels=tokens).loss.backward()
    assert len(calls) == 4


def test_a_config_speaks_their_names_and_does_not_contradict_itself(tmp_path: Path) -> None:
    register().of(decoder()).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (V, 20, 3)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"hidden_size": 24}))
    with pytest.raises(ValueError, match=r"hidden_size=24 contradicts model\.d_model=20"):
        transformers.AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_that_of_the_config_and_saves(tied: bool, tmp_path: Path) -> None:
    model = register().of(decoder(tie_embeddings=tied).eval())
    tokens = torch.randint(V, (2, 7))
    before = model(tokens).logits
    for n, multiple in ((V + 3, None), (None, 8), (V, None)):
        embedding = model.resize_token_embeddings(n, pad_to_multiple_of=multiple)
        size = n or 40
        assert (model.config.vocab_size, len(embedding.weight), embedding) == (size, size, model.get_input_embeddings())
        assert (model.get_output_embeddings().weight is embedding.weight) == tied
        assert_close(model(tokens).logits[..., :V], before)
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_close(again(tokens, labels=tokens).logits, model(tokens).logits)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    register().of(decoder("s4d")).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.lm.extra"] = stored.pop("model.lm.backbone.norm.weight")
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model\.lm\.backbone\.norm\.weight is missing; model\.lm\.extra is not expected"
    ):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_folders_of_the_first_version_are_read(tmp_path: Path) -> None:
    lm = decoder("s4d", tie_embeddings=False)
    register().of(lm).save_pretrained(tmp_path)
    stored = {name.removeprefix("model."): v for name, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = {"model_type": "crossover", "model": lm.config.to_dict(), "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    model, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(V, (1, 5))
    assert_close(model(tokens).logits, lm(tokens).logits)


def test_only_decoders_are_causal_models() -> None:
    with pytest.raises(ValueError, match="this is encoder with head='mlm'"):
        register().of(build("bert", d_model=24, n_layers=1, vocab_size=V))
