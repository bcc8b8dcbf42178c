"""Sample digits from a folder of `cachegraph export`, with numpy and onnxruntime alone."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime


class Loop:
    """The model of every step, with what is kept between them."""

    def __init__(self, folder: Path) -> None:
        self.plan = json.loads((folder / "loop.json").read_text())
        self.graphs, self.kept, self.known = self.plan["graphs"], {}, {}
        for graph in self.graphs.values():
            graph["session"] = onnxruntime.InferenceSession(folder / graph["file"])

    def __call__(self, number: int, *given: np.ndarray) -> np.ndarray:
        step = self.plan["steps"][number]
        graph = self.graphs[step["graph"]]
        feed = dict(zip(self.plan["model_inputs"], given, strict=True))
        for name in step["prologues"]:
            results = self.graphs[name]["session"].run(None, feed)
            self.known.update(zip(self.graphs[name]["outputs"], results, strict=True))
        feed |= {name: self.known[name] for name in step["known"]}
        feed |= {name: self.kept[s["step"], s["output"]] for name, s in step["slots"].items()}
        for name, numbers in step["constants"].items():
            feed[name] = np.array(numbers, {"f32": "f4", "i64": "i8"}[graph["inputs"][name][:3]])
        names = [*self.plan["model_outputs"], *step["keep"]]
        results = graph["session"].run(names, feed)
        self.kept.update(zip([(number, name) for name in names[1:]], results[1:], strict=True))
        for source in step["free"]:
            del self.kept[source["step"], source["output"]]
        return results[0]


def sample(loop: Loop, labels: np.ndarray, x: np.ndarray, guidance: float = 2.0) -> np.ndarray:
    """Deterministic DDIM with classifier-free guidance, 1000 linear betas."""
    steps, shares = len(loop.plan["steps"]), np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000)).tolist()
    times = [1 + 1000 // steps * i for i in reversed(range(steps))]
    y = np.concatenate([labels, np.full_like(labels, 10)])
    for step, time in enumerate(times):
        here, there = shares[time], 1.0 if time == 1 else shares[times[step + 1]]
        cond, uncond = np.split(loop(step, np.concatenate([x, x]), np.full_like(y, time), y), 2)
        noise = uncond + guidance * (cond - uncond)
        x = there**0.5 * (x - (1 - here) ** 0.5 * noise) / here**0.5 + (1 - there) ** 0.5 * noise
    return x.clip(-1, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("folder", 0), ("out", 0), ("--labels", "0,1,2,3"), ("--noise", None)):
        parser.add_argument(name, default=default)
    said = parser.parse_args()
    wanted = np.array(said.labels.split(","), dtype=np.int64)
    drawn = np.random.default_rng(0).standard_normal((len(wanted), 1, 16, 16), np.float32)
    start = np.load(said.noise) if said.noise else drawn
    np.save(said.out, sample(Loop(Path(said.folder)), wanted, start))
