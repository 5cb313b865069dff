"""Options that commands take, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="model.pt, .safetensors, .pt2, .onnx, torchvision:NAME, timm:NAME, hf:PATH or package.module:factory")]  # fmt: skip  # noqa: E501
Arch = Annotated[str | None, typer.Option(help="architecture of a file that holds weights only: torchvision:resnet50")]
Allow = Annotated[list[str] | None, typer.Option(metavar="PKG", help="package whose code a .pt file may use")]
UnsafePickle = Annotated[bool, typer.Option("--unsafe-pickle", help="unpickle MODEL without protection: the file can run any code")]  # fmt: skip  # noqa: E501
Input = Annotated[list[str] | None, typer.Option(metavar="SHAPE|FILE", help="example input: 1x3x224x224, 1x128:int64 (repeat for several) or an .npz file")]  # fmt: skip  # noqa: E501
Threads = Annotated[int | None, typer.Option(min=1, help="threads for computing and for the latency measurement")]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no summary; errors only")]
Still = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an earlier result in --out")]
NoOnnx = Annotated[
    bool, typer.Option("--no-onnx", help="write no ONNX file: for models that torch cannot export to it")
]
NoLatency = Annotated[bool, typer.Option("--no-latency", help="do not measure latency")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="output folder (default: MODEL-slim)")]
Recover = Annotated[str, typer.Option(help="auto (all that the samples allow, kept where it helps), none (the plain cut), or a list; see `slimc methods`")]  # fmt: skip  # noqa: E501
Data = Annotated[str | None, typer.Option(help="samples to score and recover on, and to train on with --epochs: fashion-mnist:DIR, imagefolder:DIR, npz:FILE or package.module:function; synthetic:KIND is made up, as is a kind that suits the model if nothing is given")]  # fmt: skip  # noqa: E501
ApplyData = Annotated[str | None, typer.Option("--data", help="samples to fit the kept weights on with --recover, as of `slimc compress`; made up if not given")]  # fmt: skip  # noqa: E501
SamplesOption = Annotated[int | None, typer.Option("--samples", min=2, help="how many samples to use at most (default: up to 512, or 256 that are made up; fewer for large models)")]  # fmt: skip  # noqa: E501
Schedule = Annotated[str, typer.Option(help="how it is cut and trained; see `slimc methods`")]
Epochs = Annotated[float | None, typer.Option(help="train with labels: passes over --data in all, fine-tuning included")]  # fmt: skip  # noqa: E501
BatchSize = Annotated[int | None, typer.Option(min=1, help="samples in a training batch (default 128; digits: 64); not for a function, which makes its own")]  # fmt: skip  # noqa: E501
Rate = Annotated[float | None, typer.Option(help="peak learning rate (default: 0.05, 0.0005 with layer norms)")]
Distil = Annotated[float, typer.Option(help="share of the training loss that draws to the original's outputs, 0 to 1")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="a setting of the schedule; docs/training.md lists them"),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on with an interrupted training run (OUT-run)")]
Seed = Annotated[int, typer.Option(min=0, max=2**62, help="seed of everything random")]
PlanSeed = Annotated[int | None, typer.Option("--seed", min=0, max=2**62, help="seed of everything random (default: the plan's)")]  # fmt: skip  # noqa: E501
Flops = Annotated[str | None, typer.Option(help="what may stay: 0.4, 40%, 1.6G (MACs of one sample), or the cut: -60%")]
Params = Annotated[str | None, typer.Option(help="parameters that may stay: 0.4, 40%, 12M")]
Size = Annotated[str | None, typer.Option(help="bytes of weights that may stay: 0.4, 20MB")]
Memory = Annotated[str | None, typer.Option(help="peak bytes of activations that may stay: 0.4, 8MB")]
LatencyTarget = Annotated[str | None, typer.Option("--latency", help="time that the exported model may take here, in ONNX Runtime on the CPU: 0.5, 8ms")]  # fmt: skip  # noqa: E501
Scorer = Annotated[str, typer.Option(help="which channels matter; see `slimc methods`")]
Norm = Annotated[str, typer.Option(help="l1 or l2, for magnitude; l1 chooses it")]
Normalise = Annotated[str, typer.Option(help="how groups are made comparable: mean, max, l2, cost, isomorphic, none; auto: what suits the scorer")]  # fmt: skip  # noqa: E501
Select = Annotated[str, typer.Option(help="greedy: by one ranking; exact: the best widths by integer programming (up to 30 s)")]  # fmt: skip  # noqa: E501
Ignore = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="modules or parameters to leave whole")]
RoundTo = Annotated[str, typer.Option(help="widths become multiples of N; auto: what this machine likes; 1: any")]
