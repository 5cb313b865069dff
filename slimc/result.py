"""The result of a compression: a module, a graph, a plan and a report, and how to write them down."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from . import recover
from .analysis import Analysis, Stages
from .errors import OutputError, UsageError
from .exporters import latency as latency_of
from .exporters.artifact import whole_file, whole_folder
from .exporters.formats import onnx, pt2, safetensors
from .exporters.latency import LatencyResult
from .exporters.parity import Parity, check_onnx, other_inputs
from .graph.capture import program_of
from .graph.infer import attribute
from .graph.resize import Cut
from .graph.stateless import buffers_kept, modes_kept
from .plan import Plan
from .recover import Task
from .report import Calibration, Latency, OnnxFile, OutputFile, RecoveryStep, Report, write_html
from .rewrite import Rewritten
from .samples import Samples, affordable, collect
from .timing import threads_of_a_call
from .verify import Plain

PURPOSE = {
    "model.onnx": "dense ONNX model for deployment",
    "model.onnx.data": "its weights, too large for one file",
    "model.pt2": "the same as a torch.export program",
    "model.safetensors": "weights for your own class, with plan.json: slimc.load(folder, model)",
    "plan.json": "which indices of which tensors stay",
    "report.json": "the report as data",
    "report.html": "the report as a page",
}
_TOO_LONG = "a call takes so long that too few pairs fit into the time for an interval"
_WEIGHTS_ALONE = "weights by name; your own class does not run with them, model.pt2 does"


class Compressed:
    """A smaller model with the plan that made it and the report that describes it.

    module: the user's class, smaller and trainable; where it cannot take the sizes, the graph as a module.
    graph: the rewritten graph; shares memory with `module` where both are on one device.
    """

    def __init__(
        self,
        module: nn.Module,
        rewritten: Rewritten,
        cut: Cut,
        analysis: Analysis,
        plan: Plan,
        report: Report,
        stages: Stages,
    ) -> None:
        self.module = module
        self.graph: GraphModule = rewritten.module
        self._rewritten = rewritten
        self._cut = cut
        self.analysis = analysis
        self.plan = plan
        self.report = report
        self.stages = stages

    @property
    def program(self) -> torch.export.ExportedProgram:
        """The slim model as an exported program, at inference, with the weights that `module` has now."""
        self.synchronise()
        with modes_kept(self.graph, training=False):
            return program_of(self.graph, self.analysis.captured)

    def synchronise(self) -> None:
        """Bring the graph's tensors up to date with the module's, after training or moving between devices.

        Raises OutputError where layers were replaced or converted since: the graph, and what was proven, is the old.
        """
        if self.module is not self.graph:
            _check_alike(self.module, self.graph)
            _copy_tensors(self.module, self.graph)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights under the names of the user's own class, whatever `module` is."""
        self.synchronise()
        if self.module is not self.graph:
            return {name: tensor.detach() for name, tensor in _tensors(self.module).items()}
        state = _tensors(self.analysis.model)
        named = {name: attribute(self.graph, name) for name in dict(self.graph.state_dict())}
        return {name: named.get(name, tensor).detach() for name, tensor in state.items()}

    def recover(self, name: str, data: Iterable[Any], samples: int | None = None) -> None:
        """Fit the kept weights again by one step of `slimc methods`, on batches of inputs; labels are not needed.

        samples: how many are read at most (default: as many as are quick, up to 512). All are fitted on, and the
        result stays whatever it is; `compress` and `apply` set some aside and undo what does not help.
        """
        if name in ("auto", "none", recover.FINETUNE):
            raise UsageError(
                f"recover({name!r}) is no single step: auto and none are for compress and apply, and finetune is "
                f"training (slimc.schedule); give one of {', '.join(recover.steps())}"
            )
        recover.find(name)
        captured = self.analysis.captured
        fixed = captured.batch if captured.dynamic_shapes is None else None
        found = collect(data, captured.example, samples or affordable(self.analysis.work), fixed)
        self.synchronise()
        evaluating = modes_kept(self.graph, training=False)
        with self.stages.stage("recover"), evaluating, recover.restored_on_error(self.graph):
            detail = recover.find(name).run(self._task(found))
        self.note_recovery(name, detail)
        if self.module is not self.graph:
            _copy_tensors(self.graph, self.module)

    def fit(
        self, steps: Sequence[str], samples: Samples, extra: Sequence[Samples] = (), *, in_order: bool = True
    ) -> None:
        """Run recovery steps on most of the samples; each is undone unless it brings the outputs nearer on the rest.

        extra: made up, to fit on as well, never to judge by. in_order: as the steps are given; else their order is
        chosen on the rest too.
        """
        fitted, judged = recover.set_aside(samples)
        fitted = fitted.with_more(extra)
        self.synchronise()
        with self.stages.stage("recover"), modes_kept(self.graph, training=False):
            judge = recover.Judge(self.analysis.captured.module, judged)
            for name, outcome in recover.run(self._task(fitted), steps, judge, self.stages.detail, in_order):
                self.note_recovery(name, outcome.detail, outcome.before, outcome.after, outcome.kept)
            agreement = judge.verdict(self.graph).agreement
        seen = Calibration(fitted.source, fitted.count, judged.count, agreement)
        self.report = replace(self.report, calibration=seen, seconds=dict(self.stages.seconds))
        if self.module is not self.graph:
            _copy_tensors(self.graph, self.module)

    def _task(self, samples: Samples) -> Task:
        original, seed = self.analysis.captured.module, self.report.method.seed
        types, tick = self.analysis.types, self.stages.tick
        work = self.analysis.work
        return Task(original, self.graph, self._rewritten.twins, types, self._cut, samples, seed, work, tick)

    def note_recovery(
        self, name: str, detail: str, before: float | None = None, after: float | None = None, kept: bool = True
    ) -> None:
        """Write down in the report what was done to the weights after the cut."""
        done = (*(self.report.recovery or ()), RecoveryStep(name, detail, before, after, kept))
        self.report = replace(self.report, recovery=done, seconds=dict(self.stages.seconds), onnx=None)

    def export_onnx(self, path: str | Path) -> OnnxFile:
        """Write an ONNX file and compare it with the module in ONNX Runtime.

        Raises OutputError where it cannot be written, ParityError where it differs; nothing is written then.
        """
        with whole_file(Path(path)) as work:
            return self._export_onnx(self.program, work)

    @property
    def _names(self) -> onnx.Names | None:
        """Of inputs and outputs, where the model was read from a file that names them."""
        inputs, outputs = (getattr(self.analysis.model, f"{end}_names", None) for end in ("input", "output"))
        return (inputs, outputs) if inputs and outputs else None

    def _export_onnx(self, program: torch.export.ExportedProgram, path: Path) -> OnnxFile:
        kinds = {t.dtype for t in self.graph.state_dict().values() if t.is_floating_point()}
        if (half := kinds & {torch.float16, torch.bfloat16}) and torch.float32 not in kinds:
            raise OutputError(
                f"the model computes in {str(half.pop())[6:]}, in which no two programs agree well enough for a file "
                "to be checked: compress it in float32 (model.float()), and convert the ONNX file afterwards"
            )
        if odd := _unchecked(self.analysis):
            raise OutputError(
                f"an input or output is {odd}, which cannot be compared in ONNX Runtime: leave the ONNX file out "
                "(--no-onnx, save(onnx=False))"
            )
        model = onnx.export(program, path, self._names)
        parity = self._parity(path, model.batched)
        file = OnnxFile(path.name, model.opset, model.dynamic_batch, parity.max_relative_error, parity.rounding)
        self.report = replace(self.report, onnx=file)
        self.warn(f"a batch normalisation is left in the ONNX file: {reason}" for reason in model.unfolded)
        return file

    def _parity(self, path: Path, batched: tuple[bool, ...]) -> Parity:
        example = self.analysis.captured.example
        leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def filled(case: tuple[Tensor, ...]) -> list[Any]:
            given = list(leaves)
            for place, tensor in zip(places, case, strict=True):
                given[place] = tensor.to(leaves[place].device)
            return given

        def reference(*case: Tensor) -> Any:
            args, kwargs = pytree.tree_unflatten(filled(case), spec)
            with buffers_kept(self.graph):
                outputs = self.graph(*args, **kwargs)
                return pytree.tree_map_only(Tensor, lambda t: t.to("cpu", copy=True), outputs)

        def exact(*case: Tensor) -> Any:
            return Plain(self.graph, partial(attribute, self.graph), torch.float64).results(filled(case))

        tensors = tuple(leaves[i].cpu() for i in places)
        with modes_kept(self.graph, training=False):
            batches = (1,) if self.analysis.is_huge else (None, 1, 3)
            parity = check_onnx(path, reference, other_inputs(tensors, batched, batches=batches), exact=exact)
        if not parity.outputs_vary:
            self.warn(["the outputs do not depend on the inputs' values, so that ONNX parity says little"])
        return parity

    def measure_latency(
        self, path: Path, threads: int | None = None, batch: int | None = None, budget_seconds: float | None = None
    ) -> tuple[LatencyResult, ...]:
        """Measure an exported file beside the original model, in turn, on every provider that is there.

        threads: default, as many as a call of the model has. batch: default 1, or what the file fixes.
        budget_seconds: of running, per provider (default 10).
        """
        threads = threads_of_a_call() if threads is None else threads
        options = {"threads": threads, "batch": batch, "budget_seconds": budget_seconds}
        with tempfile.TemporaryDirectory(prefix="slimc-") as folder:
            before = Path(folder) / "original.onnx"
            try:
                onnx.export(program_of(self.analysis.captured.module, self.analysis.captured), before, self._names)
            except OutputError as error:
                self.warn([f"latency was not measured, since the original cannot be exported: {error}"])
                return ()
            ranges = self.analysis.captured.example.ranges()
            given = {name: value for name, value in options.items() if value is not None}
            results = latency_of.measure_all(before, path, ranges=ranges, **given)
        rows = tuple(_row(r) for r in results if r.ci95 is not None)
        skipped = tuple(f"{r.provider}: {r.skipped or _TOO_LONG}" for r in results if r.ci95 is None)
        self.report = replace(self.report, latency=rows or None, latency_skipped=skipped)
        for result in results:
            self.warn(result.warnings)
        return results

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        onnx: bool = True,
        latency: bool = False,
        threads: int | None = None,
        batch: int | None = None,
        budget_seconds: float | None = None,
    ) -> Path:
        """Write everything to a folder, whole or not at all.

        onnx: False leaves the ONNX file out, and what is measured on it. latency: also measure that file beside the
        original; threads, batch, budget_seconds: as for `measure_latency`. Raises OutputError, ParityError.
        """
        target = Path(folder)
        self.report = replace(self.report, onnx=None, latency=None, latency_skipped=())
        with whole_folder(target, overwrite) as work:
            with self.stages.stage("export"):
                program = self.program
                if onnx:
                    self._export_onnx(program, work / "model.onnx")
                pt2.export(program, work / "model.pt2")
                safetensors.export(self.state_dict(), work / "model.safetensors")
                self.plan.save(work / "plan.json")
            if onnx and latency:
                with self.stages.stage("latency"):
                    self.measure_latency(work / "model.onnx", threads, batch, budget_seconds)
            self._write_report(work)
        return target

    def _write_report(self, work: Path) -> None:
        sizes = {path.name: path.stat().st_size for path in work.iterdir()}
        purpose = PURPOSE if self.plan.attributes is not None else {**PURPOSE, "model.safetensors": _WEIGHTS_ALONE}
        files = tuple(OutputFile(name, sizes[name], why) for name, why in purpose.items() if name in sizes)
        self.report = replace(self.report, seconds=dict(self.stages.seconds), files=files)
        self.report.write_json(work / "report.json")
        write_html(self.report, work / "report.html")

    def warn(self, sentences: Iterable[str]) -> None:
        """Add sentences to the report that a person should read."""
        known = self.report.warnings
        self.report = replace(self.report, warnings=(*known, *(s for s in sentences if s not in known)))


def _unchecked(analysis: Analysis) -> str:
    """A type among the inputs and outputs that numpy has not, or ONNX not as it is; empty if there is none."""
    output = next(node for node in analysis.captured.module.graph.nodes if node.op == "output")
    values = [*analysis.captured.example.tensors(), *(node.meta.get("val") for node in output.all_input_nodes)]
    for value in values:
        if isinstance(value, Tensor) and (value.dtype == torch.bfloat16 or value.is_complex()):
            return str(value.dtype).removeprefix("torch.")
    return ""


def _check_alike(module: nn.Module, graph: nn.Module) -> None:
    wanted, found = dict(graph.named_parameters()), dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in wanted.items():
        own = found.get(name)
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            now = "is gone" if own is None else f"is {list(own.shape)} of {own.dtype} now"
            raise OutputError(
                f"{name} of slim.module {now}: save the result before you replace or convert layers, or export the "
                "changed module yourself (torch.onnx.export)"
            )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without what get_extra_state adds to it."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _copy_tensors(source: nn.Module, target: nn.Module) -> None:
    """Copy tensors of the same name that are not shared any more: moving a module to a device parts them."""
    state = _tensors(source)
    with torch.no_grad():
        for name, tensor in _tensors(target).items():
            if name in state and state[name].data_ptr() != tensor.data_ptr():
                tensor.copy_(state[name])


def _row(result: LatencyResult) -> Latency:
    assert result.before_ms is not None
    assert result.after_ms is not None
    assert result.speedup is not None
    assert result.ci95 is not None
    assert result.batch is not None
    return Latency(
        result.runtime, result.provider, result.threads, result.batch,
        result.before_ms, result.after_ms, result.speedup, result.ci95, result.conclusive,
    )  # fmt: skip
