"""Sample digits from a folder that `cachegraph export` wrote: numpy and onnxruntime, nothing else.

python tools/onnx_sampler.py FOLDER OUT.npy [--labels 0,1,2] [--noise NOISE.npy]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime

DTYPES = {"f32": np.float32, "f16": np.float16, "i64": np.int64, "i32": np.int32}


class Loop:
    """The model of every step, with what is kept between them."""

    def __init__(self, folder: Path) -> None:
        self.plan = json.loads((folder / "loop.json").read_text())
        self.graphs, self.kept = self.plan["graphs"], {}
        for graph in self.graphs.values():
            graph["session"] = onnxruntime.InferenceSession(folder / graph["file"])

    def __call__(self, number: int, *given: np.ndarray) -> np.ndarray:
        step = self.plan["steps"][number]
        graph, feed = (
            self.graphs[step["graph"]],
            dict(zip(self.plan["model_inputs"], given, strict=True)),
        )
        for name, source in step["slots"].items():
            feed[name] = self.kept[source["step"], source["output"]]
        for name, numbers in step["constants"].items():
            feed[name] = np.array(numbers, DTYPES[graph["inputs"][name].partition("[")[0]])
        names = [*self.plan["model_outputs"], *step["keep"]]
        results = dict(zip(names, graph["session"].run(names, feed), strict=True))
        self.kept.update({(number, name): results[name] for name in step["keep"]})
        for source in step["free"]:
            del self.kept[source["step"], source["output"]]
        return results[names[0]]


def sample(loop: Loop, labels: np.ndarray, x: np.ndarray, guidance: float = 2.0) -> np.ndarray:
    """Deterministic DDIM with classifier-free guidance, 1000 linear betas."""
    steps, shares = len(loop.plan["steps"]), np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    times = [1 + 1000 // steps * i for i in reversed(range(steps))]
    y = np.concatenate([labels, np.full_like(labels, 10)])
    for step, time in enumerate(times):
        here, there = shares[time], 1.0 if time == 1 else shares[times[step + 1]]
        doubled = np.concatenate([x, x]).astype(np.float32)
        cond, uncond = np.split(loop(step, doubled, np.full_like(y, time), y), 2)
        noise = uncond + guidance * (cond - uncond)
        image = (x - (1 - here) ** 0.5 * noise) / here**0.5
        x = there**0.5 * image + (1 - there) ** 0.5 * noise
    return x.clip(-1, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("folder", 0), ("out", 0), ("--labels", "0,1,2,3"), ("--noise", "")):
        parser.add_argument(name, default=default)
    options = parser.parse_args()
    wanted = np.array(options.labels.split(","), dtype=np.int64)
    drawn = np.random.default_rng(0).standard_normal((len(wanted), 1, 16, 16))
    start = np.load(options.noise) if options.noise else drawn
    np.save(options.out, sample(Loop(Path(options.folder)), wanted, start))
