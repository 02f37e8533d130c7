"""Predictive coding in an Accelerate loop: mixed precision, accumulated and clipped gradients, a schedule."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import pc_triton as pc


def network() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main(epochs: int = 5, mixed_precision: str = "bf16") -> float:
    """The held-out accuracy."""
    set_seed(0)
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    train, held_out = (DataLoader(part, 32) for part in random_split(data, [0.8, 0.2]))

    model, changes = pc.convert(network())
    accelerator.print(changes)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * len(train))
    free_energy = pc.FreeEnergy(model)  # prepared, it is wrapped whole: all of inference in one forward
    free_energy, optimizer, schedule, train, held_out = accelerator.prepare(
        free_energy, optimizer, schedule, train, held_out
    )
    for _ in range(epochs):
        for x, y in train:
            with accelerator.accumulate(free_energy):
                accelerator.backward(free_energy(x, y))
                accelerator.clip_grad_norm_(free_energy.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    with torch.no_grad():
        right = [accelerator.gather_for_metrics(model(x).argmax(-1) == y) for x, y in held_out]
    return torch.cat(right).float().mean().item()


if __name__ == "__main__":
    print(f"held-out accuracy {main():.1%}")
