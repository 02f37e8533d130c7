"""The examples of docs/examples run, learn, and leave what their framework's users expect."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def load(name: str, *needs: str):
    for package in needs:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"lightning_mlp", "accelerate_loop", "hf_trainer_gpt2"}
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 50 for name in names)


def test_lightning():
    assert load("lightning_mlp", "lightning", "sklearn").main(epochs=2) > 0.8


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(mixed_precision):
    from_scratch = load("accelerate_loop", "accelerate", "sklearn")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # one precision a process, otherwise
    assert from_scratch.main(epochs=2, mixed_precision=mixed_precision) > 0.8
    AcceleratorState._reset_state(True)


def test_trainer(tmp_path):
    """It learns; its loss is counted as the Trainer's own; its checkpoint is a plain GPT-2."""
    example = load("hf_trainer_gpt2", "transformers", "accelerate")
    from transformers import GPT2LMHeadModel

    metrics = example.main(steps=20, output=str(tmp_path), save_steps=20, disable_tqdm=True, use_cpu=True)
    assert metrics["eval_loss"] < 0.9 * math.log(32)
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-20")
    assert not any(module.__module__.startswith("pc_triton") for module in model.modules())

    import pc_triton as pc

    model, _ = pc.convert(model.train())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = 0.0
    trainer = example.PCTrainer(model, example.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    batch = torch.stack([row["input_ids"] for row in example.sequences(8)])
    labels = batch.clone()
    labels[0, :5] = -100
    for items in (None, 500):
        own = example.Trainer.compute_loss(trainer, model, {"input_ids": batch, "labels": labels}, False, items)
        found = trainer.compute_loss(model, {"input_ids": batch, "labels": labels}, False, items)
        assert 0.98 * own < found < own  # inference explains at most 1 % of it away
