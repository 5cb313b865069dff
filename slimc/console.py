"""What people see: progress while it runs and tables at the end. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console as Rich
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from .exporters.latency import LatencyResult
    from .report import Report

STAGES = {
    "load": "reading the model",
    "input": "preparing the example input",
    "data": "reading the data",
    "train": "training",
    "cut": "training",
    "capture": "capturing the graph",
    "infer": "inferring channels",
    "score": "scoring channels",
    "plan": "choosing channels",
    "rewrite": "rewriting the graph",
    "verify": "proving that removal equals masking",
    "synthesise": "making up samples to calibrate on",
    "recover": "fitting the kept weights again",
    "export": "writing and checking the files",
    "latency": "measuring latency in ONNX Runtime",
}

_TRAINING = {"train", "cut"}
_TOLD_EVERY = 60.0
"""Seconds between lines that say how far a stage is, where no terminal shows a bar."""
_KINDS = {"scorer": "--scorer", "schedule": "--schedule", "recovery": "--recover"}


class Console:
    """Progress and results for a terminal, a file or a pipe."""

    def __init__(self, quiet: bool, as_json: bool, stages: int = 1) -> None:
        self.quiet, self.as_json, self.stages = quiet, as_json, stages
        self._out = Rich(highlight=False, soft_wrap=False)
        self._err = Rich(stderr=True, highlight=False)
        self._results = sys.stdout
        self._bar: Progress | None = None
        self._stage: tuple[str, float] | None = None
        self._cutting, self._cut_since = 0.0, 0.0
        self._detail, self._told_at = "", 0.0
        self._pace: tuple[float, float] | None = None

    def __enter__(self) -> Console:
        if self.as_json:  # the result stands alone on stdout, whatever the user's code prints
            self._results, sys.stdout = sys.stdout, sys.stderr
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage(failed=kind is not None)
        self._close()
        if self.as_json:
            sys.stdout = self._results

    def result(self, value: Any) -> None:
        """Data for --json."""
        print(json.dumps(value, indent=2, default=str), file=self._results, flush=True)

    def progress(self, kind: str, text: str) -> None:
        """What a run tells: ("stage", name), ("done", name) at its end, ("target", sentence), ("note", sentence),
        ("detail", what it does now), ("tick", "3/10"), ("live", "0.25 how training goes"), ("phase", what a phase of
        training came to)."""
        if self.quiet:
            return
        if kind == "target" and not self.as_json:
            self._print_out(text)
        if kind == "stage":
            self._begin_stage(text)
        elif kind == "done" and self._stage is not None and self._stage[0] == text and text not in _TRAINING:
            self._end_stage()
        elif kind in ("detail", "tick") and self._stage is not None:
            stage = STAGES.get(self._stage[0], self._stage[0])
            self._detail = text if kind == "detail" else self._detail
            parts = [self._detail, text if kind == "tick" else ""]
            self._show(f"{stage}: {' '.join(part for part in parts if part)}")
        elif kind == "live" and self._stage is not None:
            share, _, told = text.partition(" ")
            self._show(f"{told}, {self._time_left(float(share))}")
        elif kind in ("note", "phase"):
            self._err.print(escape(text), soft_wrap=True)

    def _time_left(self, share: float) -> str:
        """What is left of the training at the pace since it was first heard of; "" before that says anything."""
        now = time.perf_counter()
        if self._pace is None:
            self._pace = (share, now)
        begun, start = self._pace
        if share - begun < 0.01:
            return f"{100 * share:.0f}% trained"
        left = (1 - share) * (now - start) / (share - begun)
        return f"{100 * share:.0f}% trained, {_clock(left)} left"

    def _show(self, text: str) -> None:
        """How far a stage is: in the bar, or now and then in a line of its own."""
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=escape(text))
        elif now - self._told_at >= _TOLD_EVERY:
            self._told_at = now
            self._err.print(f"  {escape(text)}", soft_wrap=True)

    def _print_out(self, text: str) -> None:
        """A line on stdout, above the bar where both share a terminal."""
        console = self._err if self._bar is not None and self._out.is_terminal else self._out
        console.print(escape(text), soft_wrap=True)

    def _begin_stage(self, name: str) -> None:
        # A schedule trains and cuts in turn: one stage to look at.
        now = time.perf_counter()
        if self._stage is not None and {name, self._stage[0]} <= _TRAINING:
            self._end_cut(now)
            self._cut_since = now if name == "cut" else 0.0
            return
        self._end_stage()
        self._stage = (name, now)
        self._cut_since = now if name == "cut" else 0.0
        self._detail, self._told_at = "", now
        if not self._err.is_terminal:
            return
        if self._bar is None:
            columns = (SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._err, transient=True)
            self._bar.add_task("", total=self.stages)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=STAGES.get(name, name))

    def _end_cut(self, now: float) -> None:
        if self._cut_since:
            self._cutting, self._cut_since = self._cutting + now - self._cut_since, 0.0

    def _end_stage(self, failed: bool = False) -> None:
        if self._stage is None:
            return
        now = time.perf_counter()
        self._end_cut(now)
        name, start = self._stage
        cutting, self._stage, self._cutting = self._cutting, None, 0.0
        if not self.quiet:
            part = f", {cutting:.1f} s of it cutting and fitting" if cutting >= 0.1 else ""
            mark = "[red]✗[/red]" if failed else "[green]✓[/green]"
            self._err.print(f"{mark} {STAGES.get(name, name)} [dim]{now - start:.1f} s{part}[/dim]")
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def _finish(self) -> None:
        self._end_stage()
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # -- results --------------------------------------------------------------------------------------

    def report(self, report: Report, folder: Path) -> None:
        """The end of a compression."""
        from .report.format import recovery

        self._finish()
        if self.quiet:
            return
        self._out.print()
        if report.accuracy:
            self._out.print(_accuracy_table(report))
        self._out.print(_cost_table(report))
        if report.latency:
            self._out.print(_latency_table(report))
        for reason in report.latency_skipped:
            self._out.print(f"[dim]not measured on {escape(reason)}[/dim]", soft_wrap=True)
        proof = report.verification
        if proof is not None:
            cut = f"{proof.groups} group{'' if proof.groups == 1 else 's'}"
            self._out.print(
                "[green]✓[/green] proven: removal equals masking, largest relative error "
                f"{proof.max_relative_error:.1e} ({proof.dtype}, {proof.inputs} inputs, {cut} cut)",
                soft_wrap=True,
            )
        if report.onnx is not None:
            self._out.print(
                f"[green]✓[/green] ONNX Runtime agrees within {report.onnx.agreement} "
                f"(opset {report.onnx.opset}, {'any batch' if report.onnx.dynamic_batch else 'fixed batch'})",
                soft_wrap=True,
            )
        if report.selection is not None:
            best = report.selection
            self._out.print(
                f"[green]✓[/green] exact selection keeps {100 * best.kept:.2f}% of the scores (the ranking "
                f"{100 * best.greedy:.2f}%); no choice that spares a tenth of each group keeps more than "
                f"{100 * best.bound:.2f}%",
                soft_wrap=True,
            )
        for step in report.recovery or ():
            mark = "[green]✓[/green]" if step.kept else "[dim]–[/dim]"
            line = recovery(step.method, step.detail, step.before, step.after, step.kept)
            self._out.print(f"{mark} {escape(line)}", soft_wrap=True)
        if report.calibration is not None and report.calibration.agreement is not None:
            seen, agreement = report.calibration, report.calibration.agreement
            self._out.print(
                f"[green]✓[/green] the largest output is the original's on {100 * agreement:.1f}% of "
                f"{seen.judged} samples that were set aside",
                soft_wrap=True,
            )
        for warning in report.warnings:
            self._out.print(f"[yellow]![/yellow] {escape(warning)}", soft_wrap=True)
        files = [(str(folder / f.name), f.purpose) for f in report.files]
        files.append((str(folder / "report.html"), "the report: open this first"))
        width = max(len(path) for path, _ in files)
        self._out.print()
        for path, why in files:  # never folded, so that a path can be copied
            self._out.print(f"{escape(path):<{width}}   [dim]{escape(why)}[/dim]", soft_wrap=True)

    def inspection(self, data: dict[str, Any]) -> None:
        """Groups, what they govern, what is frozen."""
        self._finish()
        from .budget import amount

        share = data["prunable_params"] / data["params"] if data["params"] else 0.0
        self._out.print(
            f"\n{escape(data['model'])}: {amount('flops', data['macs'])} MACs, {amount('params', data['params'])} "
            f"parameters, {amount('memory', data['memory'])} of activations at the peak; "
            f"{100 * share:.3g}% of parameters lie in tensors that can shrink",
            soft_wrap=True,
        )
        table = _table("group", "channels", "kind", "axes", "governs MACs", "governs params", right=(1, 3, 4, 5))
        for row in _rows(data["groups"]):
            table.add_row(*row)
        self._out.print(table)
        if not data["frozen"]:
            self._out.print("[green]✓[/green] nothing is frozen besides the channels of inputs and outputs")
        for frozen in data["frozen"]:
            where = f" in {frozen['module']}" if frozen["module"] else ""
            line = f"{frozen['op']} at {frozen['node']}{where}: {frozen['reason']}"
            self._out.print(f"[yellow]frozen[/yellow] {escape(line)}")
        if data["batch_note"]:
            self._out.print(f"[yellow]![/yellow] fixed batch: {escape(data['batch_note'])}")

    def latency(self, results: Sequence[LatencyResult]) -> None:
        """Figures of `slimc latency`."""
        from .budget import amount
        from .report.format import provider

        self._finish()
        table = _table("provider", "threads", "batch", "A", "B", "A / B", "95% interval", right=(1, 2, 3, 4, 5, 6))
        for result in results:
            if result.before_ms is None:
                continue
            ratio = f"{result.speedup:.2f}×" if result.speedup is not None else ""
            interval = f"{result.ci95[0]:.2f}–{result.ci95[1]:.2f}" if result.ci95 else ""
            after = "" if result.after_ms is None else amount("latency", result.after_ms)
            table.add_row(
                provider(result.provider),
                str(result.threads),
                str(result.batch),
                amount("latency", result.before_ms),
                after,
                ratio,
                interval,
            )
        if table.row_count:
            self._out.print(table)
        for result in results:
            if result.skipped is not None:
                self._out.print(f"[yellow]skipped[/yellow] {result.provider}: {escape(result.skipped)}")
            elif result.ci95 is not None and not result.conclusive:
                self._out.print(f"[yellow]![/yellow] {result.provider}: no difference that can be told from noise")
            for warning in result.warnings:
                self._out.print(f"[yellow]![/yellow] {escape(warning)}")

    def methods(self, known: list[dict[str, str]]) -> None:
        """The list of methods."""
        for kind, option in _KINDS.items():
            table = _table(option, "")
            for row in known:
                if row["kind"] == kind:
                    about = f"[dim]needs {row['needs']}; {escape(row['source'])}[/dim]"
                    table.add_row(row["name"], f"{escape(row['summary'])}\n{about}")
            self._out.print(table, "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _table(*columns: str, right: Sequence[int] = ()) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number in right else "left", overflow="fold")
    return table


def _cost_table(report: Report) -> Table:
    from .budget import amount

    table = _table("", "before", "after", "stays", "asked", right=(1, 2, 3, 4))
    rows = {"flops": report.macs, "params": report.params, "size": report.size, "memory": report.memory}
    names = {"flops": "MACs", "params": "parameters", "size": "weights", "memory": "activations"}
    for metric, change in rows.items():
        if change is None:
            continue
        target = report.targets.get(metric)
        asked = "any" if target is None else f"≤ {100 * target.asked:.4g}%" if target.asked <= 1 else "no more"
        table.add_row(
            names[metric],
            amount(metric, change.before),
            amount(metric, change.after),
            f"{100 * change.share:.4g}%",
            asked,
        )
    if (time := report.targets.get("latency")) is not None:
        values = (amount("latency", value) for value in (time.before, time.after))
        asked = f"≤ {100 * time.asked:.4g}% ({amount('latency', time.asked * time.before)})"
        table.add_row("latency", *values, f"{100 * time.got:.4g}%", asked)
    return table


def _latency_table(report: Report) -> Table:
    from .budget import amount
    from .report.format import provider

    table = _table(
        "latency", "threads", "batch", "before", "after", "speed-up", "95% interval", right=(1, 2, 3, 4, 5, 6)
    )
    for row in report.latency or ():
        table.add_row(
            provider(row.provider), str(row.threads), str(row.batch), amount("latency", row.before_ms),
            amount("latency", row.after_ms), f"{row.speedup:.2f}×", f"{row.ci95[0]:.2f}–{row.ci95[1]:.2f}",
        )  # fmt: skip
    return table


def _accuracy_table(report: Report) -> Table:
    from .report.format import metric

    accuracy = report.accuracy
    assert accuracy is not None
    table = _table(accuracy.metric, "before", "right after the cut", "at the end", right=(1, 2, 3))
    values = (accuracy.before, accuracy.pruned, accuracy.after)
    table.add_row(f"accuracy ({accuracy.data})", *("–" if v is None else metric(v, accuracy.metric) for v in values))
    return table


def _rows(groups: list[dict[str, Any]]) -> list[list[str]]:
    """One row per group, by the first parameter that it shrinks."""
    from .budget import amount

    return [
        [
            escape(group["name"].removesuffix(".weight")),
            str(group["width"]),
            "exact" if group["exact"] else "renormalising",
            str(len(group["members"])),
            amount("flops", group["governs_macs"]),
            amount("params", group["governs_params"]),
        ]
        for group in groups
    ]
