"""A small classifier of 16x16 digits: tells whether generated images show the asked digit.

``train`` fits it to four fifths of scikit-learn's digits, says its accuracy on the last fifth, and
saves its weights in the package. ``measure`` draws digits with the shipped model and says how
many of them the classifier takes for the digit that was asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from cachegraph.zoo.digits import load_digits_model, sample_digits
from cachegraph.zoo.digits_quality import WEIGHTS, accuracy, build_classifier


def split_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then images and labels to test on (a fifth)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # stored as 0..16
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=seed, stratify=data.target
    )
    return images[train], labels[train], images[test], labels[test]


def train(images: Tensor, labels: Tensor, epochs: int, seed: int, console: Console) -> nn.Module:
    """Trains with shifts of a pixel and noise, so that no single pixel decides."""
    torch.manual_seed(seed)
    model = build_classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in track(range(epochs), "training", console=console):
        for index in torch.randperm(len(labels)).split(64):
            shift = tuple(torch.randint(-1, 2, (2,)).tolist())
            batch = images[index].roll(shift, (2, 3))
            batch = batch + 0.1 * torch.randn_like(batch)
            loss = F.cross_entropy(model(batch), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def draw(count: int, steps: int, cfg_scale: float, seed: int, console: Console) -> Tensor:
    """Images ``(count, 1, 16, 16)`` of the digits 0, 1, ..., 9, 0, 1, ... in turn."""
    model, images = load_digits_model(), []
    batches = (torch.arange(count) % 10).split(100)
    for number, labels in enumerate(track(batches, "sampling", console=console)):
        images.append(
            sample_digits(model, labels, steps=steps, cfg_scale=cfg_scale, seed=seed + number)
        )
    return torch.cat(images)


def save_png(images: Tensor, path: Path, columns: int = 20, zoom: int = 3) -> None:
    """Writes images in rows of ``columns``, a digit a column or two."""
    rows = -(-len(images) // columns)
    padded = torch.full((rows * columns, 20, 20), -1.0)
    padded[: len(images), 2:18, 2:18] = images[:, 0]
    grid = padded.reshape(rows, columns, 20, 20).permute(0, 2, 1, 3).reshape(rows * 20, -1)
    pixels = ((grid + 1) * 127.5).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(
        path
    )


def run_train(arguments: argparse.Namespace, console: Console) -> None:
    train_images, train_labels, test_images, test_labels = split_data(arguments.seed)
    model = train(train_images, train_labels, arguments.epochs, arguments.seed, console)
    WEIGHTS.write_bytes(save(model.state_dict()))
    console.print(
        f"accuracy {accuracy(train_images, train_labels):.2%} on {len(train_labels)} training "
        f"images, {accuracy(test_images, test_labels):.2%} on {len(test_labels)} test images"
    )


def run_measure(arguments: argparse.Namespace, console: Console) -> None:
    images = draw(arguments.count, arguments.steps, arguments.cfg_scale, arguments.seed, console)
    share = accuracy(images, torch.arange(arguments.count) % 10)
    console.print(f"{share:.2%} of {arguments.count} images show the asked digit")
    if arguments.png is not None:
        save_png(images[:200], arguments.png)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    style = argparse.ArgumentDefaultsHelpFormatter
    command = commands.add_parser("train", formatter_class=style)
    command.add_argument("--epochs", type=int, default=40)
    command.set_defaults(run=run_train)
    command = commands.add_parser("measure", formatter_class=style)
    command.add_argument("--count", type=int, default=1000, help="images")
    command.add_argument("--steps", type=int, default=50)
    command.add_argument("--cfg-scale", type=float, default=2.0)
    command.add_argument("--png", type=Path, help="where to write the first 200 images")
    command.set_defaults(run=run_measure)
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.run(arguments, Console())


if __name__ == "__main__":
    main()
