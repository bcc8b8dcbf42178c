"""Training against the published loop written plainly, and runs that are stopped."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cachegraph.diffusion.process import Process
from cachegraph.errors import InputError, TrainingError
from cachegraph.methods.router_file import read_router
from cachegraph.train.data import Draws, LatentFolder
from cachegraph.train.harmonica import measure_lambda
from cachegraph.train.routed import RoutedModel
from cachegraph.train.scores import Scores
from cachegraph.train.settings import Settings
from cachegraph.train.train import TrainedRouter, train_router
from cachegraph.world import World

from .plain import PlainHarmonica, PlainL2C
from .small import CLASSES, SHAPE, images, noise, small

T, WIDTH = 4, 4
OPTIONS: dict[str, Any] = {"l1": 1e-5, "lr": 0.3, "num_classes": CLASSES, "cfg_scale": 1.5}


def initial() -> Tensor:
    scores = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(1))
    scores[-1] = 5
    return scores


def train(
    method: str = "harmonica", *, model: nn.Module | None = None, **options: Any
) -> TrainedRouter:
    known = {"method": method, "steps": T, "initial": initial(), "global_batch_size": 4}
    own = dict(OPTIONS)
    if method == "l2c":
        del own["cfg_scale"]
        known["images"] = images
    return train_router(small() if model is None else model, **{**known, **own, **options})


def test_harmonica_is_the_published_loop() -> None:
    given = noise(6)
    found = train(batches=given, as_published=True, lambda_c=8)
    plain = PlainHarmonica(
        copy.deepcopy(small()), initial(), **OPTIONS, lambda_c=8, ste_threshold=0.1
    )
    told = []
    for e, (z, y) in enumerate(given):
        told += plain.epoch(e, z, torch.cat([y, torch.full_like(y, CLASSES)]))
    assert [record.index for record in found.log] == [2, 1, 0] * 6
    for record, (loss, gradient) in zip(found.log, told, strict=True):
        assert record.loss == pytest.approx(loss, rel=1e-5)
        assert (record.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max()
    wanted = torch.stack([router.detach() for router in plain.routers])
    assert (found.routers - wanted).abs().max() <= 1e-4 * OPTIONS["lr"] + 3e-7
    assert not any(p.grad is not None and p.grad.abs().sum() == 0 for p in plain.routers[:-1])


def test_lambda_is_that_of_full_samplings() -> None:
    plain = PlainHarmonica(
        copy.deepcopy(small()), initial(), **OPTIONS, lambda_c=8, ste_threshold=0.1
    )
    [(z, y)] = noise(1)
    x, labels = torch.cat([z, z]), torch.cat([y, torch.full_like(y, CLASSES)])
    calls = count_calls(routed := RoutedModel(small(), (x, torch.zeros(4).long(), labels)))
    asked = Settings.of("harmonica", T, {"cfg_scale": 1.5})
    scores = Scores(initial(), 0.1, World())
    lam, cache = measure_lambda(routed, scores, Process.of(T), asked, x, labels)
    wanted, left = plain.get_lambda(x, labels)
    torch.testing.assert_close(lam, wanted, rtol=1e-5, atol=0)
    for ours, theirs in zip(cache, left, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(calls) == T * (T + 1) // 2


def count_calls(model: RoutedModel) -> list[int]:
    calls: list[int] = []
    for part in (model._plain, model._valued, model._routed):
        part.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_recomputing_changes_no_gradient(recompute: str) -> None:
    given = noise(1)
    one, other = (train(batches=given, recompute=kind) for kind in (recompute, "mlp"))
    assert [a.loss for a in one.log] == [b.loss for b in other.log]
    for a, b in zip(one.log, other.log, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_the_model_is_left_as_it_was() -> None:
    before = {k: v.clone() for k, v in small().state_dict().items()}
    train(batches=noise(1))
    assert all(torch.equal(v, before[k]) for k, v in small().state_dict().items())
    assert all(p.grad is None for p in small().parameters())
    assert any(p.requires_grad for p in small().parameters())


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_l2c_is_its_formula(threshold: float | None) -> None:
    x0, y = images(0, 3)
    eps, drop, n = torch.randn(x0.shape), torch.tensor([True, False, False]), 2
    batch = {"x0": x0, "y": y, "n": n, "drop": drop, "noise": eps}
    found = train("l2c", batches=[batch], ste_threshold=threshold, l1=0.01)
    plain = PlainL2C(
        copy.deepcopy(small()),
        initial(),
        CLASSES,
        **OPTIONS | {"l1": 0.01, "ste_threshold": threshold},
    )
    loss, gradient = plain.step(x0, y, n, drop, eps)
    [record] = found.log
    assert (record.index, record.lam) == (n, None)
    assert record.loss == pytest.approx(loss, rel=1e-5)
    assert (record.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max()
    wanted = torch.stack([router.detach() for router in plain.routers])
    torch.testing.assert_close(found.routers, wanted, rtol=0, atol=1e-5)
    changed = (found.routers != initial()).any(1).tolist()
    assert changed == [i == n for i in range(T)]


def test_l1_drives_scores_and_without_it_images_do() -> None:
    compute = train(batches=noise(12), l1=0.0).routers[:-1]
    reuse = train(batches=noise(12), l1=1e4).routers[:-1]
    start = initial()[:-1]
    assert (compute > start).float().mean() > 0.9
    assert (reuse < start).all()


def test_the_mask_as_a_schedule() -> None:
    found = train(batches=noise(1), l1=1e4, lr=5.0)
    rows = found.rows()
    assert rows[0] == [1, 1, 1, 1]
    assert found.schedule().policy.rows == tuple(map(tuple, rows))
    wanted = torch.sigmoid(found.routers.flip(0)[1:]) > 0.1
    assert torch.equal(torch.tensor(rows[1:]).bool(), wanted)
    assert train("l2c", max_steps=1).rows()[::2] == [[1] * 4] * 2


def test_without_batches_they_come_from_the_seed() -> None:
    one, same, other = (train(max_steps=8, global_seed=seed) for seed in (0, 0, 1))
    assert len(one.log) == 6
    assert torch.equal(one.routers, same.routers)
    assert not torch.equal(one.routers, other.routers)


def test_as_published_the_same_batches_come_again() -> None:
    settings = Settings.of("harmonica", T, {"as_published": True, "global_batch_size": 4})
    draws, seen = Draws(settings, World()), []
    for epoch in range(5):
        seen.append(draws.noise(epoch, SHAPE)[0])
        if epoch % 2 == 0:  # lambda_c is two trajectories
            draws.reseed()
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[0], seen[1])


# --- runs on disk


class Killed(Exception):  # noqa: N818 - it stands for a signal
    """What a signal does, at a moment of the test's choice."""


@pytest.mark.parametrize("method", ["harmonica", "l2c"])
def test_killed_and_resumed_is_unbroken(tmp_path: Path, method: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options: dict[str, Any] = {"max_steps": 24, "ckpt_every": 5}
    train(method, out=whole, **options)
    for moment in (3, 7, 12, 14, 22):

        def kill(_text: str, done: int, _total: int, moment: int = moment) -> None:
            if done == moment:
                raise Killed

        with pytest.raises(Killed):
            train(method, out=broken, progress=kill, **options)
        with (broken / "log.jsonl").open("a") as file:
            file.write('{"index": 1, "lo')  # the signal may come in the middle of a line
    found = train(method, out=broken, **options)
    assert (broken / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    one, other = (torch.load(f / "router.pt", weights_only=False) for f in (whole, broken))
    assert all(torch.equal(one["routers"][k], v) for k, v in other["routers"].items())
    for index, state in one["opt"]["state"].items():
        assert all(torch.equal(v, other["opt"]["state"][index][k]) for k, v in state.items())
    assert (broken / "schedule.yaml").read_bytes() == (whole / "schedule.yaml").read_bytes()
    assert len(found.log) == (18 if method == "harmonica" else 24)
    assert (broken / "router.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_may_be_made_longer(tmp_path: Path) -> None:
    train(out=tmp_path / "a", max_steps=8)
    longer = train(out=tmp_path / "a", max_steps=16)
    assert torch.equal(longer.routers, train(max_steps=16).routers)


def test_the_checkpoint_is_a_published_one(tmp_path: Path) -> None:
    found = train(out=tmp_path / "run", max_steps=8)
    path = tmp_path / "run" / "router.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    assert list(content["routers"]) == [f"{i}.prob" for i in range(T)]
    assert content["args"].lr == OPTIONS["lr"]
    assert content["args"].num_sampling_steps == T
    optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(WIDTH)) for _ in range(T)])
    optimiser.load_state_dict(content["opt"])
    mask = read_router(path, 0.1, "harmonica")
    rows = torch.tensor(found.rows()).bool()
    assert torch.equal(torch.tensor(mask.attn), rows[:, ::2])
    assert torch.equal(torch.tensor(mask.mlp), rows[:, 1::2])
    more = noise(2, seed=5)
    on = train(batches=more, initial=path)
    assert on.log[0].loss != train(batches=more).log[0].loss
    steps = {int(state["step"]) for state in content["opt"]["state"].values()}
    assert steps == {2}


def test_what_does_not_fit_is_refused_and_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(out=folder, max_steps=8)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    router = folder / "router.pt"
    with pytest.raises(InputError, match="another l1"):
        train(out=folder, max_steps=8, l1=0.5)
    with pytest.raises(InputError, match="another model"):
        train(model=_changed(small()), out=folder, max_steps=8)
    with pytest.raises(InputError, match="another number of steps"):
        train_router(small(), method="harmonica", steps=6, initial=router, max_steps=6)
    with pytest.raises(InputError, match="of another model"):
        train(initial=torch.zeros(T, 6))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="no training run"):
        train(out=tmp_path / "notes", max_steps=8)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def _changed(model: nn.Module) -> nn.Module:
    changed = copy.deepcopy(model)
    next(changed.parameters()).data[0] += 1
    return changed


def test_no_number_stops_training_before_anything_is_written(tmp_path: Path) -> None:
    broken = _changed(small())
    next(broken.parameters()).data[0] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        train(model=broken, out=tmp_path / "run", max_steps=8)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda": 3}, "unknown option 'lambda'"),
        ({"lr": 0.0}, "option lr is out of range"),
        ({"global_batch_size": 3}, "option global_batch_size"),
        ({"method": "l3c"}, "unknown method 'l3c'"),
        ({"batches": []}, "there are no batches"),
        ({"method": "l2c", "images": None, "cfg_scale": 2.0}, "needs data"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    known = {"method": "harmonica", "steps": T, "initial": initial()}
    with pytest.raises(InputError) as error:
        train_router(small(), **{**known, **options})
    assert message in str(error.value) or "no option 'cfg_scale'" in str(error.value)


def test_latents_of_a_folder_come_once_an_epoch(tmp_path: Path) -> None:
    for name, first, count in (("a", 0, 3), ("b", 3, 4)):
        rows = torch.arange(first, first + count)
        latents = rows.view(-1, 1, 1, 1).expand(-1, 4, 2, 2).float().contiguous()
        save_file({"latents": latents, "labels": rows}, tmp_path / f"{name}.safetensors")
    data = LatentFolder(tmp_path, seed=0)
    epochs = [[data(3 * epoch + at, 2) for at in range(3)] for epoch in range(2)]
    for epoch in epochs:
        seen = [int(label) for _, labels in epoch for label in labels]
        assert len(set(seen)) == 6
        for latents, labels in epoch:
            assert torch.equal(latents[:, 0, 0, 0].long(), labels)
    assert [b.tolist() for _, b in epochs[0]] != [b.tolist() for _, b in epochs[1]]
    again = LatentFolder(tmp_path, seed=0)(4, 2)
    assert torch.equal(again[1], epochs[1][1][1])
    (tmp_path / "c.safetensors").write_text("no")
    with pytest.raises(InputError, match="not a file of latents"):
        LatentFolder(tmp_path, seed=0)


def test_the_log_is_json(tmp_path: Path) -> None:
    found = train(out=tmp_path / "run", max_steps=8)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    for one, record in zip(told, found.log, strict=True):
        assert set(one) == {"index", "loss", "data_loss", "l1_loss", "lam", "grad", "step", "epoch"}
        assert one["loss"] == record.loss
        assert torch.equal(torch.tensor(one["grad"]), record.grad)
