"""Models of Hugging Face transformers: `convert` leaves them what they are, and PC trains them as their loss would."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F

import pc_triton as pc

KINDS = ["gpt2", "llama", "bert", "vit"]
PADDING = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])  # none, right and left
SIZES = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _quiet():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()


def make(kind: str, **options):
    """A tiny model of that kind in training mode, without dropout, with weights that make its attention peaked."""
    import transformers as hf

    torch.manual_seed(0)
    if kind == "gpt2":
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 4}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **none, **SPECIAL, **options))
    elif kind == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **sizes, **SPECIAL, **options))
    elif kind == "gemma2":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4}
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, **sizes, **SPECIAL))
    elif kind == "bert":
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
        sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 8}
        model = hf.BertForMaskedLM(hf.BertConfig(**SIZES, **sizes, **none))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_channels": 1}
        small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 5}
        model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, **small))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    return model.train()


def batch(kind: str, padded: bool):
    """The model's inputs, its labels as its own loss takes them, and what its output is clamped to."""
    g = torch.Generator().manual_seed(1)
    if kind == "vit":
        labels = torch.randint(5, (3,), generator=g)
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=g)}, labels, labels
    tokens, labels = torch.randint(1, 32, (2, 3, 6), generator=g)
    inputs = {"input_ids": tokens}
    if padded:
        inputs["attention_mask"] = PADDING
        labels = labels.masked_fill(PADDING == 0, -100)
    if kind == "bert":
        return inputs, labels, labels
    return inputs, labels, F.pad(labels[:, 1:], (0, 1), value=-100)


def close(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_converted_it_is_the_same_model(kind, padded):
    """Logits, keys, and at the prediction its own loss and gradients: shifted, ignored and tied as it has them."""
    plain, (inputs, labels, y) = make(kind), batch(kind, padded)
    model, changes = pc.convert(copy.deepcopy(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum("pc.Categorical over the keys" in change for change in changes.values()) == 2
    truth = plain(**inputs, labels=labels)
    seen = y != -100 if kind != "vit" else ...
    close(model(**inputs).logits, truth.logits)
    for order in ("error", "sweep"):
        close(pc.FreeEnergy(model, order=order, precision=1.0).infer(inputs).output[seen], truth.logits[seen])
    loss = pc.FreeEnergy(model, steps=1)(inputs, y)
    close(loss, truth.loss)
    loss.backward()
    truth.loss.backward()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        close(found.grad, wanted.grad)
    left = {name for name, change in changes.items() if "->" not in change}
    assert left == {"bert": {"cls.predictions.decoder"}, "vit": set()}.get(kind, {"lm_head"})


@pytest.mark.parametrize("kind", KINDS)
def test_inference_lowers_the_free_energy(kind, monkeypatch):
    monkeypatch.setattr(sys.modules["pc_triton.report"], "LONG_RUN", 2)
    model, (inputs, _, y) = make(kind), batch(kind, True)
    pc.convert(model)
    report = pc.FreeEnergy(model).report(inputs, y)
    assert report.free_energies[1] < report.free_energies[0]
    assert {node.family for node in report.nodes} == {"Gaussian", "Categorical"}
    assert all(0 < node.residual < 1 for node in report.nodes)


def test_a_new_bert_is_settled():
    """Its attention is all but uniform: F hardly depends on queries and keys, and they are held by more than that."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 16}
    model = hf.BertForMaskedLM(hf.BertConfig(**SIZES, **sizes, hidden_dropout_prob=0.0, pad_token_id=0)).train()
    pc.convert(model)
    x = torch.randint(1, 32, (8, 16))
    report = pc.FreeEnergy(model).report({"input_ids": x}, x)
    precisions = [node.precision for node in report.nodes if node.precision]
    assert min(precisions) > 5e-4 * sum(precisions) / len(precisions)
    assert report.settled > 0.9


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_counts_nothing(kind):
    """A padded sequence settles where it does alone; its states give no weight to keys behind a mask."""
    model, (inputs, _, y) = make(kind), batch(kind, True)
    pc.convert(model)
    options = {"precision": 2.0, "steps": 4, "step": 0.3}
    positions, y = (PADDING.cumsum(1) - 1).clamp_min(0), y.masked_fill(PADDING == 0, -100)
    together = pc.FreeEnergy(model, **options).infer({**inputs, "position_ids": positions}, y)
    for i, real in enumerate(PADDING.bool()):
        alone = pc.FreeEnergy(model, **options).infer(
            {"input_ids": inputs["input_ids"][i : i + 1, real], "position_ids": positions[i : i + 1, real]},
            y[i : i + 1, real],
        )
        close(together.free_energy[i : i + 1], alone.free_energy)
        close(together.output[i][real], alone.output[0])
    (weights, *_) = (state for state in together.states.values() if state.dim() == 4)
    hidden = (PADDING == 0)[:, None, None, :] | torch.ones(6, 6, dtype=torch.bool).triu(1)
    assert (weights.masked_select(hidden) == 0).all()
    assert (weights.sum(-1)[:2] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_saved_and_loaded_both_ways(kind, tmp_path):
    """Trained by PC, saved as ever, loaded in the plain model; and the plain model's weights in a converted one."""
    plain, (inputs, _, y) = make(kind), batch(kind, False)
    model, _ = pc.convert(copy.deepcopy(plain))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    free_energy, losses = pc.FreeEnergy(model), []
    for _ in range(8):
        losses.append(free_energy(inputs, y))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, pc.Distribution) for module in loaded.modules())
    assert loaded.config._attn_implementation == "sdpa"
    close(loaded(**inputs).logits, model.eval()(**inputs).logits)
    model.load_state_dict(plain.state_dict())
    close(model(**inputs).logits, plain.eval()(**inputs).logits)


def test_what_has_no_form_is_left_by_name():
    """Gemma 2 caps its attention's logits, which torch's attention does not."""
    model, changes = pc.convert(make("gemma2"))
    attention = {name: change for name, change in changes.items() if name.endswith("self_attn")}
    assert len(attention) == 2
    assert all(change.startswith("left as it is: Gemma2Attention") for change in attention.values())
    assert changes["lm_head"].startswith("left as it is: its logits are the output")
    inputs, _, y = batch("llama", True)
    pc.FreeEnergy(model)(inputs, y).backward()


def test_another_attention_than_that_of_convert():
    """The model's own switch makes attention a plain predictor again; a model of the same config has no nodes."""
    model, (inputs, _, y) = make("llama"), batch("llama", False)
    pc.convert(model)
    nodes = set(pc.FreeEnergy(model).infer(inputs, y).states)
    assert type(model)(model.config)(**inputs).logits.shape == (3, 6, 32)
    model.set_attn_implementation("sdpa")
    plain = set(pc.FreeEnergy(model).infer(inputs, y).states)
    assert nodes - plain == {"model.layers.0.self_attn", "model.layers.1.self_attn"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing():
    model, (inputs, _, y) = make("gpt2"), batch("gpt2", True)
    pc.convert(model)
    pc.FreeEnergy(model)(inputs, y).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": pc.checkpoint_contexts})
    pc.FreeEnergy(model)(inputs, y).backward()
    for p, g in zip(model.parameters(), wanted):
        close(p.grad, g)
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match=r"node 'transformer.h.0.attn.c_attn' lies in .* context_fn="):
        pc.FreeEnergy(model)(inputs, y)


def test_evaluation_and_backpropagation_are_one_graph():
    """Before and after an inference."""
    from torch._dynamo.testing import CompileCounter

    model, (inputs, labels, y) = make("gpt2"), batch("gpt2", False)
    pc.convert(model)
    counter = CompileCounter()
    whole = torch.compile(model, backend=counter, fullgraph=True)
    close(whole(**inputs).logits, model(**inputs).logits)
    pc.FreeEnergy(model)(inputs, y).backward()
    F.cross_entropy(whole(**inputs).logits.flatten(0, 1), labels.flatten()).backward()
    assert counter.frame_count == 1
