"""A compiled artifact: a folder that runs without the model's code.

``manifest.json`` is written last and the folder is renamed when whole, so a folder without one is
the remains of an interrupted save.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from cachegraph.backends import AheadOfTime, Progress, check_all, get_backend
from cachegraph.backends.named import named_graphs
from cachegraph.errors import ArtifactError, nearest
from cachegraph.folders import refuse_foreign, writing, written_whole
from cachegraph.graph.provenance import NOTHING, Provenance
from cachegraph.graph.serialise import graph_to_json
from cachegraph.graph.weights import (
    WEIGHTS_FILE,
    Stamp,
    distinct,
    refuse_changed,
    relink,
    save_weights,
    stamp,
)
from cachegraph.runtime.cuda_graph import recorders
from cachegraph.runtime.known import REQUEST, Prologues, StepFunction, prologue_name
from cachegraph.runtime.program import OtherPlan, Program
from cachegraph.runtime.release import Released, only_before, refuse_release
from cachegraph.runtime.runner import Runner
from cachegraph.runtime.tracking import Track

from .data import from_data
from .manifest import (
    COMPILED,
    GRAPHS,
    MANIFEST,
    PROVENANCE,
    SCHEDULE,
    Form,
    Manifest,
    digest_in,
    form_folder,
    plan_file,
    record,
)
from .origin import Origin

if TYPE_CHECKING:
    from cachegraph.schedule.schedule import Schedule


def _unheard(_: str) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True, repr=False)
class Artifact:
    """A compiled denoising loop, in memory or read from a folder.

    Attributes:
        program: what the steps do.
        schedule_text: what was asked for, as YAML.
        graphs: one lowered graph a variant; weights are shared.
        prologues: by the name of their file, the graphs that compute what is known beforehand:
            see :func:`cachegraph.runtime.known.named_prologues`.
        texts: the graphs as text, with provenance.
        weights: name -> tensor.
        backend: name of the backend that runs the graphs.
        device: that the weights are on.
        compiled: backend -> folder with what it compiled ahead of time.
        saved: folder of an artifact that holds some of these -> digest of its manifest.
        plans: name -> schedule, as YAML, and plan, where there are several; the program's is the
            first of them.
        provenance_text: where the nodes of the graphs come from, as JSON; empty where that is
            not known.
        forms: artifacts of the same model, plans and weights for calls of other forms: sizes that
            do not vary, other constants.
    """

    program: Program
    schedule_text: str
    graphs: Sequence[fx.GraphModule]
    prologues: Mapping[str, fx.GraphModule]
    texts: tuple[str, ...]
    weights: Mapping[str, Tensor]
    backend: str
    device: torch.device
    compiled: dict[str, Path] = field(default_factory=dict)
    saved: dict[Path, str] = field(default_factory=dict)
    plans: Mapping[str, tuple[str, OtherPlan]] = field(default_factory=dict)
    provenance_text: str = ""
    forms: tuple[Artifact, ...] = ()
    stamp: Stamp = field(init=False)

    def __post_init__(self) -> None:
        """An artifact has the weights of this moment; one that was changed since is not used."""
        object.__setattr__(self, "stamp", stamp(self.weights))

    @cached_property
    def schedule(self) -> Schedule:
        """What was asked for."""
        import yaml  # running it needs neither

        from cachegraph.schedule.schedule import load_schedule

        return load_schedule(yaml.safe_load(self.schedule_text))

    @cached_property
    def provenance(self) -> Provenance:
        """Where the nodes of the graphs come from, and what each costs.

        Raises:
            ArtifactError: the artifact was edited.
        """
        if not self.provenance_text:
            return NOTHING
        try:
            found: Provenance = from_data(json.loads(self.provenance_text), Provenance)
        except ValueError as error:
            raise ArtifactError(
                f"{PROVENANCE} of the artifact is wrong: {error}", remedy="compile it again"
            ) from error
        return found

    def __repr__(self) -> str:
        """``Artifact(fora, 50 steps, 2 variants, aoti, cpu)``."""
        method, steps = self.schedule.policy.method, len(self.program.steps)
        variants = f"{len(self.graphs)} variant{'s' if len(self.graphs) > 1 else ''}"
        sizes = f"{len(self.forms) + 1} forms, " if self.forms else ""
        said = f"{steps} steps, {variants}, {sizes}{self.backend}"
        return f"Artifact({method}, {said}, {self.device})"

    def plan(self, name: str) -> Artifact:
        """The artifact of one of its plans, with the graphs that this runs.

        Raises:
            ArtifactError: it has no such plan.
        """
        if name not in self.plans:
            raise ArtifactError(
                f"the artifact has no plan {name!r}",
                expected=", ".join(self.plans) or "one of several plans; it has but one",
                remedy=nearest(name, self.plans),
            )
        text, other = self.plans[name]
        whole = self.program.with_plan(other)
        program = whole.without_others()
        used = [self.program.variants.index(layout) for layout in program.variants]
        names = {prologue_name(layout.name) for layout in program.variants} | {REQUEST}
        return replace(
            self,
            program=program,
            schedule_text=text,
            graphs=[self.graphs[index] for index in used],
            prologues={n: self.prologues[n] for n in self.prologues if n in names},
            texts=tuple(self.texts[index] for index in used),
            plans={},
            forms=tuple(form.plan(name) for form in self.forms),
        )

    def runner(
        self,
        *,
        track: Track = "timestep",
        backend: str | None = None,
        timesteps: Sequence[float] | None = None,
        cuda_graphs: bool = False,
        functions: Sequence[StepFunction] | None = None,
        release: bool = False,
    ) -> Runner:
        """A callable with the traced model's signature.

        Args:
            track: how the step of a call is found: ``timestep`` or ``count``.
            backend: another backend than the artifact was compiled for.
            timesteps: the sampler's, in place of the schedule's; see :class:`Runner`.
            cuda_graphs: record each step's kernels once and launch them all at once.
            functions: of a runner of the same graphs, to use again.
            release: leave weights that only prologues use out of memory while steps run.

        Raises:
            BackendError: unknown backend, or one whose work cannot be recorded.
            InputError: ``cuda_graphs`` on a device without them, or ``release`` where weights are
                not mapped from a folder or are needed at every step.
            SessionError: ``track`` is unknown, or ``timesteps`` do not fit the schedule.
        """
        refuse_changed(self.weights, self.stamp)
        chosen = get_backend(backend or self.backend)
        recorder = recorders(self.device, chosen.name) if cuda_graphs else None
        prologues = Prologues.of(self.program, self.prologues, batched=not chosen.exact)
        if release:
            prologues = replace(prologues, released=self._released(chosen.name, chosen.exact))
        functions = self.functions(backend) if functions is None else functions
        place = str(next(iter(self.saved), ""))

        def make(program: Program, times: Sequence[float] | None) -> Runner:
            return Runner(
                program, functions, self.weights, track, prologues, times, recorder, place
            )

        runner = make(self.program, timesteps)
        for number, (name, (_, other)) in enumerate(self.plans.items()):
            program = self.program.with_plan(other)
            fits = timesteps is not None and len(timesteps) == len(program.steps)
            alone = runner if number == 0 else make(program, timesteps if fits else None)
            runner.plans[name] = alone
        others = [
            form.runner(
                track=track,
                backend=chosen.name,
                timesteps=timesteps,
                cuda_graphs=cuda_graphs,
                release=release,
            )
            for form in self.forms
        ]
        for name, alone in runner.plans.items():
            alone.forms = (alone, *(other.plans[name] for other in others))
        runner.forms = (runner, *others)
        return runner

    def _released(self, backend: str, exact: bool) -> Released:
        refuse_release(self.device, mapped=bool(self.saved), exact=exact, backend=backend)
        steps = [module.graph for module in self.graphs]
        names = only_before(steps, [module.graph for module in self.prologues.values()])
        return Released([self.weights[name] for name in sorted(names)])

    def with_weights(self, weights: Mapping[str, Tensor]) -> Artifact:
        """The same loop, whose graphs take other tensors from now on.

        Args:
            weights: of the same names, shapes and dtypes.
        """
        for module in (*self.graphs, *self.prologues.values()):
            relink(module, weights)
        forms = tuple(form.with_weights(weights) for form in self.forms)
        return replace(self, weights=weights, forms=forms)

    def functions(self, backend: str | None = None) -> list[StepFunction]:
        """One function of flat tensors a variant.

        Args:
            backend: another backend than the artifact was compiled for. One that compiles ahead of
                time writes its files to a temporary folder that lives as long as the artifact.

        Raises:
            BackendError: unknown backend, or one that cannot take the graphs.
        """
        chosen = get_backend(backend or self.backend)
        if isinstance(chosen, AheadOfTime):
            self.compile_ahead(chosen.name)
            folder = self.compiled_folder(chosen.name)
            named = named_graphs(self.program, self.graphs)
            return chosen.open(named, self.weights, folder, self.device)
        return [
            chosen.load(graph, [port.spec for port in layout.interface.inputs])
            for graph, layout in zip(self.graphs, self.program.variants, strict=True)
        ]

    def compiled_folder(self, backend: str) -> Path:
        """Where a backend's files lie that were compiled ahead of time.

        Raises:
            ArtifactError: it lay in a folder that is gone or holds another artifact by now, whose
                files do something else.
        """
        compiled = self.compiled[backend]
        for folder, digest in self.saved.items():
            if folder in compiled.parents and digest_in(folder) != digest:
                raise ArtifactError(
                    "the artifact's folder is gone, or another one was written to it since",
                    place=str(folder),
                    expected="the artifact as it was saved or read",
                    remedy="load it again: cachegraph.load(path)",
                )
        return compiled

    def compile_ahead(self, backend: str | None = None, progress: Progress = _unheard) -> None:
        """Let a backend that compiles ahead of time do so now, where it has not yet.

        Args:
            backend: another one than the artifact was compiled for.
            progress: is told what is being done.

        Raises:
            BackendError: unknown backend, or one that cannot take the graphs.
        """
        chosen = get_backend(backend or self.backend)
        for form in self.forms:
            form.compile_ahead(chosen.name, progress)
        if not isinstance(chosen, AheadOfTime) or chosen.name in self.compiled:
            return
        folder = Path(tempfile.mkdtemp(prefix="cachegraph-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        with writing(folder):
            self._emit(chosen, folder, progress)
        self.compiled[chosen.name] = folder

    def _emit(self, backend: AheadOfTime, folder: Path, progress: Progress) -> None:
        named = named_graphs(self.program, self.graphs)
        check_all(backend, [(name, graph.module.graph) for name, graph in named.items()])
        backend.emit(named, self.weights, folder, progress)

    def save(
        self, path: str | Path, progress: Progress = _unheard, origin: Origin | None = None
    ) -> Path:
        """Write the artifact beside ``path`` and rename it when whole.

        Args:
            path: of the folder.
            progress: is told what is being done.
            origin: all that it was made from, where that can be told: :func:`is_made_from`.

        Raises:
            ArtifactError: ``path`` exists and is no artifact.
        """
        target = Path(path)
        refuse_changed(self.weights, self.stamp)
        refuse_foreign(target, MANIFEST, "artifact")
        with written_whole(target) as partial:
            self._write(partial, progress, origin)
        for number, form in enumerate((self, *self.forms)):
            compiled = target / form_folder(number) / COMPILED / self.backend
            if os.path.isdir(compiled):  # no error: it is saved
                form.compiled[self.backend] = compiled
                form.saved[target] = digest_in(target)
        return target

    def _write(self, folder: Path, progress: Progress, origin: Origin | None) -> None:
        forms = (self, *(replace(form, backend=self.backend) for form in self.forms))
        places = [folder / form_folder(number) for number in range(len(forms))]
        # First, for it needs the memory that weights take which are mapped and were not read yet.
        for place, form in zip(places, forms, strict=True):
            form._write_compiled(place / COMPILED / self.backend, progress)
        stored, aliases = distinct(self.weights)
        digests = save_weights(stored, folder / WEIGHTS_FILE)
        (folder / SCHEDULE).write_text(self.schedule_text)
        for name, (text, _) in self.plans.items():
            (folder / plan_file(name)).write_text(text)
        for place, form in zip(places, forms, strict=True):
            form._write_graphs(place)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        Manifest(
            torch=torch.__version__.split("+")[0],
            backend=self.backend,
            files={str(p.relative_to(folder)): record(p) for p in files},
            weights=digests,
            aliases=aliases,
            forms=tuple(
                Form(form.program, {name: other for name, (_, other) in form.plans.items()})
                for form in forms
            ),
            made_from=origin.digest if origin is not None and origin.unchanged() else None,
        ).write(folder)

    def _write_graphs(self, folder: Path) -> None:
        """Graphs and where they come from; the schedules are those of all forms."""
        (folder / GRAPHS).mkdir(parents=True)
        names = [layout.name for layout in self.program.variants]
        for name, text in zip(names, self.texts, strict=True):
            (folder / GRAPHS / f"{name}.txt").write_text(text)
        modules = dict(zip(names, self.graphs, strict=True)) | dict(self.prologues)
        for name, module in modules.items():
            lines = ",\n".join(json.dumps(node) for node in graph_to_json(module.graph))
            (folder / GRAPHS / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        (folder / PROVENANCE).write_text(self.provenance_text)

    def _write_compiled(self, folder: Path, progress: Progress) -> None:
        """What the backend compiled ahead of time, if it does."""
        chosen = get_backend(self.backend)
        if not isinstance(chosen, AheadOfTime):
            return
        if chosen.name in self.compiled:
            shutil.copytree(self.compiled_folder(chosen.name), folder)
        else:
            folder.mkdir(parents=True)
            self._emit(chosen, folder, progress)
