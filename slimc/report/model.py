"""What one compression did, as frozen values; `Report.to_dict()` is report.json.

A stage that did not run is `None` here and `null` in the file: nothing is filled in for it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimc.errors import LoadError
from slimc.report.codec import decode, encode

STAGES = ("capture", "infer", "score", "plan", "rewrite", "verify", "recover", "train", "export", "latency")


@dataclass(frozen=True)
class Change:
    """A counted amount in the original and in the slim model."""

    before: int
    after: int

    @property
    def share(self) -> float:
        """The share that stayed: 0.4 when 40% is left; 1 when there was nothing to begin with."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class TargetResult:
    """One budget: `asked` and `got` are shares of `before`; `before` and `after` are in the target's own unit.

    flops: MACs; params: parameters; memory and size: bytes; latency: milliseconds.
    """

    asked: float
    got: float
    before: float
    after: float

    @property
    def met(self) -> bool:
        """Whether the slim model stays within the budget."""
        return self.got <= self.asked


@dataclass(frozen=True)
class Verification:
    """The proof that removal equals masking.

    `max_relative_error` is the largest difference between the slim model and the masked original, relative to the
    largest output; `moved` is how far the cut itself moved the output, on the same scale. An error that is not far
    below `moved` would prove nothing; `redrawn` says that the trained weights told too little, so that the proof was
    repeated with other ones. `moved` is null where nothing was cut.
    """

    passed: bool
    max_relative_error: float
    moved: float | None
    dtype: str
    inputs: int
    groups: int
    renormalising_groups: int
    redrawn: bool = False


@dataclass(frozen=True)
class FrozenOperator:
    """An operator around which channels keep their full width, and why: it has no rule, or its rule has a limit."""

    op: str
    node: str
    module: str
    reason: str


@dataclass(frozen=True)
class OnnxFile:
    """The exported ONNX file and how far it is from the model that it came from.

    `rounding`: how far the model's own float32 outputs are from float64, where the file was judged by that.
    """

    path: str
    opset: int
    dynamic_batch: bool
    max_relative_error: float
    rounding: float | None = None

    @property
    def agreement(self) -> str:
        """The error, and the rounding that explains it."""
        noise = "" if self.rounding is None else f", where the model's own float32 is {self.rounding:.1e} from float64"
        return f"{self.max_relative_error:.1e}{noise}"


@dataclass(frozen=True)
class Latency:
    """One paired latency measurement; `ci95` is the 95% interval of the speed-up.

    conclusive: whether it leaves out what one file was measured to differ from itself by.
    """

    runtime: str
    provider: str
    threads: int
    batch: int
    before_ms: float
    after_ms: float
    speedup: float
    ci95: tuple[float, float]
    conclusive: bool = True

    @property
    def is_faster(self) -> bool:
        """Whether a speed-up may be claimed: the whole interval lies above 1, and clear of it."""
        return self.conclusive and self.ci95[0] > 1.0

    @property
    def is_slower(self) -> bool:
        """Whether the slim model is slower: the whole interval lies below 1, and clear of it."""
        return self.conclusive and self.ci95[1] < 1.0


@dataclass(frozen=True)
class Accuracy:
    """The metric of the original, of the plain cut and of the recovered model; a share for `top1`, not a percentage.

    pruned: null where channels went in several steps with training between. data: what it was measured on.
    """

    metric: str
    before: float
    pruned: float | None
    after: float
    data: str = "test"


@dataclass(frozen=True)
class TrainingPoint:
    """A phase of training as it ended.

    epochs: trained so far. flops: share of the MACs that was left. loss: mean training loss of its last epoch, null
    where the caller's own loop trained. accuracy: on the validation data, null where it was not measured.
    """

    phase: str
    epochs: float
    flops: float
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Training:
    """How a schedule trained and cut: its settings, what was fitted after every cut, and one point for each phase.

    before: accuracy of the original on the validation data; null without any. metric: what is shown as accuracy, "top1"
        or "metric" where it is the user's own.
    """

    schedule: str
    epochs: float
    before: float | None
    settings: Mapping[str, str]
    mended: tuple[str, ...]
    points: tuple[TrainingPoint, ...]
    metric: str = "top1"


@dataclass(frozen=True)
class RecoveryStep:
    """One thing that was done to fit the kept weights again.

    before, after: distance of the outputs from the original's on samples that were not fitted: the squared difference
    over the original's own spread (0 equal, 1 no better than a constant); null where it was not measured.
    kept: False where the weights were put back, since the step brought the outputs no nearer, or took the softmax of
    [N, classes] clearly further from the original's.
    """

    method: str
    detail: str
    before: float | None = None
    after: float | None = None
    kept: bool = True


@dataclass(frozen=True)
class Selection:
    """What share of all channels' scores stays: by the greedy ranking, and by the selection that was used.

    bound: no choice of widths within the targets keeps more, of those that spare what the ranking spared: up to a tenth
        of each group.
    """

    method: str
    greedy: float
    kept: float
    bound: float

    @property
    def won(self) -> float:
        """By what share of what is kept the greedy ranking falls short of it."""
        return 1 - self.greedy / self.kept if self.kept else 0.0

    @property
    def gap(self) -> float:
        """By what share of the bound that which is kept may fall short of the best."""
        return 1 - self.kept / self.bound if self.bound else 0.0


@dataclass(frozen=True)
class Calibration:
    """The samples that recovery saw: where they come from, how many were fitted, and how many judged by.

    agreement: share of the judged samples on which slim and original model have the same largest output; null where
    the first output is not [N, classes].
    """

    source: str
    fitted: int
    judged: int
    agreement: float | None


@dataclass(frozen=True)
class Method:
    """How the cut was chosen. scorer: None where the schedule has numbers of its own."""

    scorer: str | None
    schedule: str
    round_to: int
    seed: int


@dataclass(frozen=True)
class GroupRow:
    """One group of channels of which `kept` out of `width` stay, in report and plan; groups stand in network order.

    `exact` is false where a norm over this group renormalises. `members` are the (parameter, axis) that it shrinks.
    """

    name: str
    width: int
    kept: int
    exact: bool
    members: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class OutputFile:
    """One file of the output folder, with its size in bytes."""

    name: str
    bytes: int
    purpose: str


@dataclass(frozen=True)
class Environment:
    """The machine and the versions that the numbers belong to."""

    slimc: str
    python: str
    torch: str
    onnxruntime: str | None
    platform: str
    cpu: str
    threads: int
    accelerator: str | None = None


@dataclass(frozen=True)
class Report:
    """Everything that report.json says.

    `macs` counts multiply-accumulates of one sample, `size` bytes of weights and
    `memory` bytes of activations alive at the peak. `seconds` holds every stage of `STAGES`.
    """

    model: str
    targets: Mapping[str, TargetResult]
    macs: Change
    params: Change
    size: Change
    memory: Change | None
    method: Method
    groups: tuple[GroupRow, ...]
    frozen: tuple[FrozenOperator, ...]
    seconds: Mapping[str, float | None]
    environment: Environment
    verification: Verification | None = None
    selection: Selection | None = None
    recovery: tuple[RecoveryStep, ...] | None = None
    calibration: Calibration | None = None
    training: Training | None = None
    accuracy: Accuracy | None = None
    onnx: OnnxFile | None = None
    latency: tuple[Latency, ...] | None = None
    latency_skipped: tuple[str, ...] = ()
    files: tuple[OutputFile, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The file promises every stage, so that a reader need not tell "missing" from "null".
        object.__setattr__(self, "seconds", {**dict.fromkeys(STAGES), **self.seconds})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; InternalError where a number is not finite, since JSON cannot say it."""
        data: dict[str, Any] = encode(self, "report")
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read back what `to_dict` wrote; fields that this version does not know are ignored.

        LoadError names a field that is missing or of another type.
        """
        report: Report = decode(cls, data, "report")
        return report

    def write_json(self, path: Path) -> None:
        """Write report.json."""
        path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8", "replace")

    @classmethod
    def read_json(cls, path: str | Path) -> Report:
        """Read report.json back; LoadError where it is none."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise LoadError(f"{path} cannot be read as a report: {error}") from error
        return cls.from_dict(data)
