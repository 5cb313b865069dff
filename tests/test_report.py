from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slimc.errors import InternalError, LoadError
from slimc.report import (
    Accuracy,
    Change,
    Environment,
    FrozenOperator,
    GroupRow,
    Latency,
    Method,
    OnnxFile,
    OutputFile,
    RecoveryStep,
    Report,
    TargetResult,
    Training,
    TrainingPoint,
    Verification,
    render_html,
    write_html,
)
from slimc.report import format as text
from slimc.report.html import frozen_rows, verdict
from slimc.report.svg import COLUMNS_PER_STRIP

OPTIONAL_STAGES = ("memory", "verification", "recovery", "training", "accuracy", "onnx", "latency")


def groups_of(count: int) -> tuple[GroupRow, ...]:
    return tuple(
        GroupRow(
            name=f"layer{index // 6 + 1}.{index % 6}.conv1",
            width=64 * 2 ** (index * 4 // count),
            kept=(20 + (index * 37) % 44) * 2 ** (index * 4 // count),
            exact=index % 5 != 4,
            members=((f"layer{index}.conv1.weight", 0), (f"layer{index}.bn1.weight", 0)),
        )
        for index in range(count)
    )


def latency(speedup: float, low: float, high: float, batch: int = 1) -> Latency:
    return Latency(
        runtime="onnxruntime",
        provider="CPUExecutionProvider",
        threads=2,
        batch=batch,
        before_ms=20.0 * batch,
        after_ms=20.0 * batch / speedup,
        speedup=speedup,
        ci95=(low, high),
    )


def bare_report(groups: int = 5) -> Report:
    """A report of a run in which every optional stage was left out."""
    return Report(
        model="example:net",
        targets={"flops": TargetResult(asked=0.4, got=0.399, before=1000.0, after=399.0)},
        macs=Change(1000, 399),
        params=Change(200, 90),
        size=Change(800, 360),
        memory=None,
        method=Method(scorer="magnitude", schedule="one-shot", round_to=1, seed=0),
        groups=groups_of(groups),
        frozen=(),
        seconds={"capture": 0.5},
        environment=Environment("0.1.0", "3.11.7", "2.14.1", None, "Linux", "an invented processor", 2),
    )


def full_report(groups: int = 5) -> Report:
    """A report of a run in which every stage took part; all numbers are invented."""
    return dataclasses.replace(
        bare_report(groups),
        model="torchvision:example50",
        targets={
            "flops": TargetResult(asked=0.4, got=0.3999, before=4089184256, after=1635264000),
            "latency": TargetResult(asked=0.5, got=0.53, before=20.0, after=10.6),
        },
        macs=Change(4089184256, 1635264000),
        params=Change(25557032, 9876543),
        size=Change(102228128, 39506172),
        memory=Change(11239424, 7225344),
        verification=Verification(True, 3.1e-13, 0.42, "float64", 4, groups, 1),
        recovery=(
            RecoveryStep("reconstruct", "512 unlabelled images, 36 layers"),
            RecoveryStep("finetune", "8 epochs, learning rate 0.01"),
        ),
        accuracy=Accuracy("top1", 0.7613, 0.2201, 0.7542),
        frozen=(
            FrozenOperator("aten.sort.default", "sort_1", "head.pool", "sorting along an axis fixes its order"),
            FrozenOperator("aten.sort.default", "sort_2", "", "sorting along an axis fixes its order"),
            FrozenOperator("aten.fft_rfft.default", "rfft", "mix.0", "no rule for this operator"),
        ),
        seconds={"capture": 2.1, "infer": 0.61, "score": 0.04, "plan": 0.2, "rewrite": 0.9, "verify": 3.3}
        | {"recover": 140.0, "export": 8.8, "latency": 21.4},
        onnx=OnnxFile("model.onnx", 20, True, 2.4e-7),
        latency=(latency(1.83, 1.79, 1.88), latency(1.02, 0.97, 1.07, 8), latency(0.9, 0.86, 0.94, 32)),
        files=(
            OutputFile("model.onnx", 39600000, "dense model for any ONNX runtime"),
            OutputFile("plan.json", 91234, "what was kept, by original index"),
        ),
        warnings=("One group renormalises: its norm runs over fewer channels than in training.",),
    )


class PageCheck(HTMLParser):
    """Collects the elements that are open, and every address that the page refers to."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: str) -> PageCheck:
    parser = PageCheck()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("report", [bare_report(), full_report(), full_report(150)], ids=["bare", "full", "150 groups"])
def test_a_report_survives_json(report: Report, tmp_path: Path) -> None:
    report.write_json(tmp_path / "report.json")
    assert Report.read_json(tmp_path / "report.json") == report


def trained_report() -> Report:
    points = (
        TrainingPoint("tock", 1.0, 1.0, 0.31, 0.91),
        TrainingPoint("tick", 1.1, 0.7, 0.35, None),
        TrainingPoint("finetune", 4.0, 0.4, 0.28, 0.905),
    )
    training = Training("tick-tock", 4.0, 0.912, {"ticks": "10"}, ("reconstruct", "bn"), points)
    return replace(full_report(), training=training, accuracy=Accuracy("top1", 0.9, None, 0.89, "validation"))


def test_training_is_drawn_and_read_back() -> None:
    report = trained_report()
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    page = render_html(report)
    assert page.count("<circle") - render_html(replace(report, training=None)).count("<circle") == 2
    assert "tick-tock, 4 epochs in all" in page
    assert "tock: 100.0% of the FLOPs, 91.00%, 1 epochs" in page
    assert "validation" in page


def test_training_that_was_never_measured_has_a_table_and_no_picture() -> None:
    report = trained_report()
    assert report.training is not None
    unseen = tuple(replace(point, accuracy=None) for point in report.training.points)
    page = render_html(replace(report, training=replace(report.training, points=unseen, before=None), accuracy=None))
    assert "trajectory" not in page.partition("</style>")[2]
    assert "All 3 phases" in page


def test_a_metric_of_the_users_is_no_percentage() -> None:
    report = trained_report()
    assert report.training is not None
    points = tuple(dataclasses.replace(p, accuracy=-1.632 if p.accuracy else None) for p in report.training.points)
    training = dataclasses.replace(report.training, before=-1.5, points=points, metric="metric")
    page = render_html(dataclasses.replace(report, training=training))
    assert "-1.632" in page
    assert "163.2" not in page


def test_the_file_has_the_documented_form() -> None:
    data = full_report().to_dict()
    assert data["targets"]["flops"] == {"asked": 0.4, "got": 0.3999, "before": 4089184256, "after": 1635264000}
    assert data["macs"] == {"before": 4089184256, "after": 1635264000}
    assert {"passed", "max_relative_error", "groups", "renormalising_groups"} <= data["verification"].keys()
    assert data["frozen"][2] == {
        "op": "aten.fft_rfft.default",
        "node": "rfft",
        "module": "mix.0",
        "reason": "no rule for this operator",
    }
    assert data["onnx"].keys() == {"path", "opset", "dynamic_batch", "max_relative_error", "rounding"}
    assert data["latency"][0]["ci95"] == [1.79, 1.88]
    assert data["accuracy"].keys() == {"metric", "before", "pruned", "after", "data"}
    assert data["groups"][0]["members"] == [["layer0.conv1.weight", 0], ["layer0.bn1.weight", 0]]


def test_absent_stages_are_null_and_the_page_still_renders() -> None:
    data = json.loads(json.dumps(bare_report().to_dict()))
    assert [data[stage] for stage in OPTIONAL_STAGES] == [None] * len(OPTIONAL_STAGES)
    assert data["seconds"]["capture"] == 0.5
    assert data["seconds"]["latency"] is None
    page = render_html(bare_report())
    checked(page)
    assert "not measured" in page
    assert "not verified" in page


@pytest.mark.parametrize("absent", OPTIONAL_STAGES)
def test_the_page_renders_without_any_one_stage(absent: str) -> None:
    checked(render_html(dataclasses.replace(full_report(), **{absent: None})))  # type: ignore[arg-type]


def test_a_model_without_groups_still_has_a_page() -> None:
    page = render_html(dataclasses.replace(full_report(), groups=()))
    checked(page)
    assert "No group of channels can be pruned" in page


def test_hostile_names_are_escaped() -> None:
    hostile = "<script>alert('x')</script>\"'&{{ 7 * 7 }}"
    for count in (1, 150):
        group = dataclasses.replace(groups_of(1)[0], name=hostile)
        report = dataclasses.replace(
            full_report(),
            model=hostile,
            groups=(group,) * count,
            warnings=(hostile,),
            frozen=(FrozenOperator(hostile, hostile, hostile, hostile),),
            files=(OutputFile(hostile, 1, hostile),),
            targets={hostile: TargetResult(0.5, 0.5, 2, 1)},
            accuracy=Accuracy(hostile, 0.1, 0.1, 0.1),
            recovery=(RecoveryStep(hostile, hostile),),
            latency=(dataclasses.replace(latency(1.1, 1.0, 1.2), runtime=hostile, provider=hostile),),
        )
        page = render_html(report)
        parser = checked(page)
        assert "script" not in parser.tags
        assert page.count("&lt;script&gt;") > 10
        assert "{{ 7 * 7 }}" in page


def test_the_page_refers_to_nothing_outside_itself() -> None:
    for report in (bare_report(), full_report(), full_report(150)):
        page = render_html(report)
        parser = checked(page)
        assert parser.addresses == []
        assert not {"script", "link", "iframe", "object", "embed", "img"} & set(parser.tags)
        assert "://" not in page
        assert "url(" not in page
        assert "@import" not in page


@pytest.mark.parametrize("count", [5, 30, 31, 150])
def test_every_group_is_in_the_picture_and_in_the_table(count: int) -> None:
    report = full_report(count)
    page = render_html(report)
    details = page[page.index("<details>") : page.index("</details>")]
    picture = page[page.index("Channels kept") : page.index("<details>")]
    assert len(re.findall(r"<tr><td", details)) == count + 1  # and the sum
    assert picture.count('class="kept"') == count
    assert picture.count('class="track"') == count
    assert picture.count('class="strip"') == (0 if count <= 30 else -(-count // COLUMNS_PER_STRIP))
    assert f'<td class="number">{sum(group.width for group in report.groups)}</td>' in details
    assert f'<td class="number">{sum(group.kept for group in report.groups)}</td>' in details


def test_frozen_rows_add_up_to_the_frozen_operators() -> None:
    report = full_report()
    rows = frozen_rows(report.frozen)
    assert sum(len(row.places) for row in rows) == len(report.frozen) == 3
    assert [row.op for row in rows] == ["aten.sort.default", "aten.fft_rfft.default"]
    assert rows[0].places == ("head.pool", "sort_2")


def test_stage_times_add_up_to_the_sum_shown() -> None:
    # 2.1 + 0.61 + 0.04 + 0.2 + 0.9 + 3.3 + 140.0 + 8.8 + 21.4 = 177.35 s = 2.96 min
    assert '<td class="number">3.0 min</td>' in render_html(full_report())


def test_a_speed_up_is_claimed_only_when_its_interval_lies_above_one() -> None:
    assert [verdict(row) for row in full_report().latency or ()] == ["faster", "no difference shown", "slower"]
    unclear = dataclasses.replace(full_report(), latency=(latency(1.4, 0.99, 1.8),))
    page = render_html(unclear)
    assert "no speed-up shown" in page
    assert "× faster" not in page
    assert "1.83× faster" in render_html(full_report())


def test_a_missed_target_is_said() -> None:
    page = render_html(full_report())
    assert page.count('<span class="bad">no</span>') == 1
    assert page.count('<span class="good">yes</span>') == 1


def test_macs_and_flops_are_told_apart() -> None:
    page = render_html(full_report())
    assert "4.09 G → 1.64 G" in page
    assert "FLOPs, at 2 per MAC: 8.18 G → 3.27 G" in page


def test_numbers_that_are_not_finite_are_refused_by_name() -> None:
    broken = dataclasses.replace(full_report(), latency=(latency(float("nan"), 1.0, 1.1),))
    with pytest.raises(InternalError, match=r"report\.latency\[0\]\.\w+ is nan"):
        broken.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macs": None}, r"report\.macs"),
        ({"model": 7}, r"report\.model is 7; str"),
        ({"params": {"before": 1}}, r"report\.params\.after is missing"),
        ({"params": {"before": True, "after": 1}}, r"report\.params\.before is True; int"),
        ({"latency": [{}]}, r"report\.latency\[0\]\.runtime is missing"),
        ({"groups": [{"name": "a", "width": 1, "kept": 1, "exact": True, "members": [["w"]]}]}, r"members\[0\]"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(change: dict[str, object], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        Report.from_dict({**full_report().to_dict(), **change})


def test_fields_of_a_later_version_are_ignored() -> None:
    assert Report.from_dict({**full_report().to_dict(), "energy": {"joules": 1}}) == full_report()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (999_999, "1.00 M"), (4089184256, "4.09 G"), (40.94, "40.9")],
)
def test_amounts_have_three_digits(value: float, shown: str) -> None:
    assert text.amount(value) == shown


def test_percentages_keep_the_digits_that_tell_targets_apart() -> None:
    assert [text.percent(share) for share in (0.4, 0.3999, 1.0, 0.0)] == ["40%", "39.99%", "100%", "0%"]


def test_the_page_is_written(tmp_path: Path) -> None:
    write_html(full_report(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_html(full_report())
