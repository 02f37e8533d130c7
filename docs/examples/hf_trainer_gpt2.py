"""Predictive coding with Hugging Face's Trainer: GPT-2 on sequences that count in steps, by one method overridden."""

import tempfile

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import pc_triton as pc


class PCTrainer(Trainer):
    """A Trainer that learns from the free energy; it evaluates, saves and resumes as ever."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        next_tokens = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
        loss = pc.FreeEnergy(model)(inputs, next_tokens)  # per label
        if num_items_in_batch is None:
            return loss
        return loss * (next_tokens != -100).sum() / num_items_in_batch  # of all batches whose gradients accumulate


def sequences(number: int, length: int = 16, vocabulary: int = 32) -> list[dict[str, torch.Tensor]]:
    first, step = torch.randint(vocabulary, (number, 1)), torch.randint(1, 4, (number, 1))
    tokens = (first + step * torch.arange(length)) % vocabulary
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(steps: int = 150, output: str | None = None, **arguments) -> dict[str, float]:
    """The held-out metrics."""
    set_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model, _ = pc.convert(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)))
    options = TrainingArguments(
        output or tempfile.mkdtemp(), max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=16,
        gradient_accumulation_steps=2, report_to="none", **arguments,
    )  # fmt: skip
    trainer = PCTrainer(model, options, train_dataset=sequences(2048), eval_dataset=sequences(128))
    trainer.train()
    return trainer.evaluate()


if __name__ == "__main__":
    print(f"held-out loss {main()['eval_loss']:.3f} nats a token")
