"""A Mamba under Lightning: `pip install lightning`, then `python examples/lightning_module.py`.

What is ours is the model, built in __init__ and called in training_step; all else is as for any other.
"""

import logging
import tempfile
import warnings

import lightning  # pyright: ignore[reportMissingImports]  # not needed by the tests of the rest
import torch
from crossover import build
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Language(lightning.LightningModule):
    """Learns the next byte."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lm = build("mamba", d_model=64, n_layers=2, vocab_size=256)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of a batch of windows, (B, L + 1)."""
        (window,) = batch
        out = self.lm(window[:, :-1], targets=window[:, 1:])
        self.log("loss", out.loss)
        return out.loss + out.aux_loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW at the rate of the hyperparameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def main() -> None:
    """Trains, saves and loads."""
    lightning.seed_everything(0, verbose=False)
    text = torch.tensor(list(b"the cat sat on the mat, and the dog sat on the log. " * 40))
    windows = TensorDataset(text.unfold(0, 65, 5))
    module = Language()
    with tempfile.TemporaryDirectory() as scratch:
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(
            max_steps=30, accumulate_grad_batches=2, gradient_clip_val=1.0, default_root_dir=scratch, **options
        )
        trainer.fit(module, DataLoader(windows, batch_size=8, shuffle=True))
        trainer.save_checkpoint(f"{scratch}/last.ckpt")
        again = Language.load_from_checkpoint(f"{scratch}/last.ckpt", weights_only=True)
    same = all(torch.equal(a, b) for a, b in zip(module.lm.parameters(), again.lm.parameters(), strict=True))
    print(f"loss {trainer.callback_metrics['loss']:.2f} nats per byte after {trainer.global_step} steps")
    print(f"loaded again, the weights are the same: {same}")


if __name__ == "__main__":
    main()
