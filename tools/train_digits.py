"""Trains the small class-conditional DiT that ships as the model ``digits``.

The data are the 1,797 handwritten digits of scikit-learn, 8x8 pixels, scaled to [-1, 1] and
enlarged bilinearly to 16x16. The model predicts the noise under the linear schedule of DDPM with
1,000 timesteps; the exponential average of its weights is saved in float16. Every step seeds its
own randomness, so a run that is interrupted and resumed computes what an unbroken one would.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from cachegraph.zoo.dit import DiT

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "cachegraph" / "zoo" / "digits.safetensors"
TIMESTEPS = 1000
NUM_CLASSES = 10


@dataclass(frozen=True)
class Settings:
    """What a run depends on."""

    steps: int
    batch: int
    learning_rate: float
    ema_decay: float
    warmup: int
    seed: int
    hidden_size: int
    num_heads: int
    depth: int
    bf16: bool


def digits_data() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 16, 16)`` in [-1, 1] and labels ``(1797,)``."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # stored as 0..16
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    return images, torch.tensor(data.target, dtype=torch.int64)


def alphas_cumprod() -> Tensor:
    """Share of signal variance left at every timestep ``(1000,)``: DDPM's linear betas."""
    betas = torch.linspace(1e-4, 2e-2, TIMESTEPS, dtype=torch.float64)
    return (1 - betas).cumprod(0).float()


def initialise(model: DiT) -> None:
    """The adaLN-Zero start of the DiT publication: every block begins as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.x_embedder.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
    nn.init.zeros_(patches.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)
    silent = [block.adaLN_modulation[1] for block in model.blocks]
    silent += [model.final_layer.adaLN_modulation[1], model.final_layer.linear]
    for linear in silent:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


class Training:
    """Model, average and optimiser of one run, and where it stands."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device, self.step = settings, device, 0
        torch.manual_seed(settings.seed)
        self.model = DiT(
            input_size=16,
            patch_size=2,
            in_channels=1,
            hidden_size=settings.hidden_size,
            depth=settings.depth,
            num_heads=settings.num_heads,
            class_dropout_prob=0.1,
            num_classes=NUM_CLASSES,
            learn_sigma=False,
        )
        initialise(self.model)
        self.model.to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.99)
        )
        images, labels = digits_data()
        self.images, self.labels = images.to(device), labels.to(device)
        self.signal = alphas_cumprod().to(device)

    def rate(self) -> float:
        """Learning rate of the coming step: linear warm-up, then half a cosine to zero."""
        s = self.settings
        warm = min(1.0, (self.step + 1) / s.warmup)
        return s.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.step / s.steps))

    def advance(self) -> Tensor:
        """Makes one step and returns its loss, a scalar that stays on the device."""
        s = self.settings
        torch.manual_seed(s.seed * 1_000_003 + self.step)
        index = torch.randint(len(self.images), (s.batch,)).to(self.device)
        t = torch.randint(TIMESTEPS, (s.batch,)).to(self.device)
        image = self.images[index]
        noise = torch.randn(image.shape).to(self.device)
        signal = self.signal[t][:, None, None, None]
        noisy = signal.sqrt() * image + (1 - signal).sqrt() * noise
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.bf16):
            predicted = self.model(noisy, t, self.labels[index])
        loss = F.mse_loss(predicted.float(), noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # young averages forget faster, else the start would weigh for thousands of steps
        decay = min(s.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages, values = list(self.ema.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averages, values, 1 - decay)
        return loss.detach()

    def save_checkpoint(self, path: Path) -> None:
        """Writes all that :meth:`resume` needs; the old file stays whole until the new one is."""
        parts = ("model", "ema", "optimizer")
        state = {name: getattr(self, name).state_dict() for name in parts}
        beside = path.with_name(path.name + ".part")
        torch.save(state | {"step": self.step}, beside)
        beside.replace(path)

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint of the same model sizes."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]

    def save_weights(self, path: Path, loss: float) -> None:
        """Writes the averaged weights in float16 with what made them as metadata."""
        s = self.settings
        metadata = {
            "num_heads": str(s.num_heads),
            "num_classes": str(NUM_CLASSES),
            "trained": "tools/train_digits.py on sklearn.datasets.load_digits, 16x16, noise "
            "prediction, linear betas 1e-4..2e-2, 1000 timesteps, averaged weights",
            "steps": str(self.step),
            "planned_steps": str(s.steps),  # the learning rate falls over these
            "batch": str(s.batch),
            "seed": str(s.seed),
            "loss": f"{loss:.5f}",
        }
        state = {k: v.half().cpu().contiguous() for k, v in self.ema.state_dict().items()}
        # not save_file: that makes files which only their owner can read
        path.write_bytes(save(state, metadata=metadata))


def train(run: Training, out: Path, checkpoint: Path | None, console: Console) -> None:
    """Runs to the end, reporting every 100 steps and saving every 250."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    began, average, losses = time.monotonic(), math.nan, []
    with Progress(*columns, console=console, refresh_per_second=1) as progress:
        task = progress.add_task("steps", total=run.settings.steps, completed=run.step, loss="")
        while run.step < run.settings.steps:
            losses.append(run.advance())
            last = run.step == run.settings.steps
            if run.step % 100 == 0 or last:
                average = torch.stack(losses).mean().item()
                losses.clear()
                text = f"loss {average:.5f}"
                progress.update(task, completed=run.step, loss=text)
                console.log(f"step {run.step}: {text}, {time.monotonic() - began:.0f} s")
            if run.step % 250 == 0 or last:
                run.save_weights(out, average)
                if checkpoint is not None:
                    run.save_checkpoint(checkpoint)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="weights to write")
    parser.add_argument("--checkpoint", type=Path, help="file to resume from and to write")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, help="CPU threads, torch's choice if not given")
    arguments = vars(parser.parse_args())
    out, checkpoint = arguments.pop("out"), arguments.pop("checkpoint")
    threads = arguments.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Training(Settings(**arguments), device)
    console = Console()
    if checkpoint is not None and checkpoint.exists():
        run.resume(checkpoint)
        console.log(f"resumed at step {run.step}")
    parameters = sum(p.numel() for p in run.model.parameters())
    console.log(f"{parameters:,} parameters on {device.type}")
    train(run, out, checkpoint, console)


if __name__ == "__main__":
    main()
