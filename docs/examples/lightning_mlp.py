"""Predictive coding in Lightning: a LightningModule whose training step returns the free energy."""

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import pc_triton as pc


class Digits(lightning.LightningModule):
    def __init__(self, lr: float = 3e-3):
        super().__init__()
        layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.model, _ = pc.convert(layers)
        self.free_energy = pc.FreeEnergy(self.model)
        self.lr = lr

    def training_step(self, batch, _):
        loss = self.free_energy(*batch)
        self.log("free energy", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        logits = self.model(x)
        self.log_dict({"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(-1) == y).float().mean()})

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)}


def main(epochs: int = 5) -> float:
    """The held-out accuracy."""
    lightning.seed_everything(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    train, held_out = (DataLoader(part, 64) for part in random_split(data, [0.8, 0.2]))
    trainer = lightning.Trainer(max_epochs=epochs, gradient_clip_val=1.0, logger=False, enable_checkpointing=False)
    trainer.fit(Digits(), train, held_out)
    return trainer.callback_metrics["accuracy"].item()


if __name__ == "__main__":
    print(f"held-out accuracy {main():.1%}")
