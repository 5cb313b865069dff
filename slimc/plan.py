"""The plan: which indices of which tensors stay, as data that can be read, edited and applied again."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import PlanError
from .graph.groups import Grouping
from .graph.infer import Types
from .graph.resize import Cut
from .report.model import GroupRow
from .scores import Scores

if TYPE_CHECKING:
    from .analysis import Analysis

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """A cut of one architecture.

    kept: for every parameter and buffer that shrinks, per axis, the surviving indices of the original, ascending.
    shapes: the original shape of every tensor in `kept`, by which another architecture is recognised.
    source_sha256: hash of the names, shapes and bytes of the weights that the plan was made for.
    attributes: new sizes of the user's own modules, by path and attribute; None where the class cannot take
        them, and then attributes_note says why.
    scores: for each group, by what its channels were ranked (larger stays; of a cut in steps, in the step that
        decided); None for a group that the scorer says nothing of, and in all where training chose.
    """

    kept: dict[str, dict[int, list[int]]]
    shapes: dict[str, list[int]]
    groups: tuple[GroupRow, ...] = ()
    targets: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    source_sha256: str | None = None
    attributes: dict[str, dict[str, Any]] | None = None
    attributes_note: str | None = None
    scores: dict[str, list[float] | None] | None = None

    # -- as a file ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        data = asdict(self)
        data["kept"] = {name: {str(axis): list(ix) for axis, ix in axes.items()} for name, axes in self.kept.items()}
        data["groups"] = [asdict(group) | {"members": [list(m) for m in group.members]} for group in self.groups]
        return {"format": FORMAT, **data}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(_lines(self.to_dict()) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan, of a file or of a result's folder; raises PlanError that says where the file is wrong."""
        path = Path(path) / "plan.json" if Path(path).is_dir() else Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} is no JSON that can be read: {error}") from error
        return Plan.from_dict(data, str(path))

    @staticmethod
    def from_dict(data: Any, source: str = "plan") -> Plan:
        """A plan from JSON data; raises PlanError that says where it is wrong."""
        if not isinstance(data, dict) or not isinstance(data.get("kept"), dict):
            raise PlanError(f'{source} is no plan: it needs "kept", a table from tensor name to kept indices')
        if data.get("format", FORMAT) != FORMAT:
            raise PlanError(f"{source} has plan format {data['format']}; this slimc reads format {FORMAT}")
        kept = {name: _axes(name, axes, source) for name, axes in data["kept"].items()}
        tables = {name: _table(name, data.get(name), source) for name in ("shapes", "targets", "method", "versions")}
        if not all(isinstance(shape, list) for shape in tables["shapes"].values()):
            raise PlanError(f'{source}: "shapes" must be a table from tensor name to a list of sizes')
        attributes = data.get("attributes")
        if attributes is not None and not all(
            isinstance(own, dict) for own in _table("attributes", attributes, source).values()
        ):
            raise PlanError(f'{source}: "attributes" must be a table from module to a table of its sizes')
        return Plan(
            kept,
            tables["shapes"],
            _groups(data.get("groups") or [], source),
            tables["targets"],
            tables["method"],
            tables["versions"],
            data.get("source_sha256"),
            attributes,
            data.get("attributes_note"),
            _scores(data.get("scores"), source),
        )

    # -- as a cut -------------------------------------------------------------------------------------

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The kept slices of a state dictionary; needs no graph."""
        self._check_tensors(state)
        result = dict(state)
        for name, axes in self.kept.items():
            for axis, indices in axes.items():
                result[name] = result[name].index_select(axis, _index(indices, result[name]))
        return result

    def alive(self, types: Types) -> npt.NDArray[np.bool_]:
        """Which variables of a model live under this plan; checks that coupled indices go together."""
        tensors = types.weights
        more = [alias for aliases in types.aliases.values() for alias in aliases]
        self._check_tensors(tensors | {alias: tensors[types.first(alias)] for alias in more})
        _check_ties(types, self.kept)
        kept = {types.first(name): axes for name, axes in self.kept.items()}
        alive = np.zeros(types.solution.variables, np.bool_)
        masks = {}
        for name, axes in types.tensors.items():
            for axis, terms in enumerate(axes):
                mask = np.ones(len(terms), np.bool_)
                if axis in kept.get(name, {}):
                    mask[:] = False
                    mask[kept[name][axis]] = True
                masks[name, axis] = mask
                lives = types.solution.factors(terms)[mask]
                alive[lives[lives >= 0]] = True
        untouched = np.ones(types.solution.variables, np.bool_)
        for axes in types.tensors.values():
            for terms in axes:
                factors = types.solution.factors(terms)
                untouched[factors[factors >= 0]] = False
        alive |= untouched
        _check_coupling(types, alive, masks)
        return alive

    def edit(self, analysis: Analysis, groups: Mapping[str, Sequence[int]]) -> Plan:
        """A plan in which these groups keep other channels, with all that goes with them; the rest as it is.

        analysis: of a model that the plan fits (`slimc.inspect`). groups: by name, the positions in the group of the
        channels that stay, as `scores` counts them. `slimc.apply` makes the cut. Raises PlanError.
        """
        types, alive = analysis.types, self.alive(analysis.types)
        known = {group.name: group for group in analysis.groups}
        for name, channels in groups.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, 1) or list(known)[:1]
                raise PlanError(f"there is no group {name}" + (f"; did you mean {close[0]}?" if close else ""))
            group, kept = known[name], _positions(name, channels)
            if len(kept) < group.floor:
                raise PlanError(f"{name} would keep none of its {group.width} channels; at least 1 is needed")
            if len(set(kept)) < len(kept) or (kept and not 0 <= kept[0] <= kept[-1] < group.width):
                raise PlanError(f"{name}: channels are positions from 0 to {group.width - 1}, each once")
            alive[group.variables] = False
            alive[group.variables[kept]] = True
        own = make(types, analysis.grouping, Cut(types, alive))
        note = "the plan was edited; slimc.apply finds the sizes"
        return replace(self, kept=own.kept, shapes=own.shapes, groups=own.groups, attributes=None, attributes_note=note)

    def _check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, axes in self.kept.items():
            if name not in tensors:
                raise PlanError(
                    f"the plan cuts {name}, which this model does not have (or does not use). "
                    "A plan fits only the architecture it was made for."
                )
            if is_lazy(tensors[name]):
                raise PlanError(f"{name} has no shape yet: run the model once, so that its lazy modules get theirs")
            shape = list(tensors[name].shape)
            if name in self.shapes and list(self.shapes[name]) != shape:
                raise PlanError(
                    f"{name} has shape {shape} in this model, but the plan was made for {list(self.shapes[name])}. "
                    "A plan fits only the architecture it was made for."
                )
            for axis, indices in axes.items():
                _check_indices(name, axis, indices, shape)


def make(types: Types, grouping: Grouping, cut: Cut, **facts: Any) -> Plan:
    """Write down a cut of a captured model."""
    kept: dict[str, dict[int, list[int]]] = {}
    shapes: dict[str, list[int]] = {}
    for first, axes in types.tensors.items():
        shrunk = {i: cut.indices(axis).tolist() for i, axis in enumerate(axes) if not cut.whole(axis)}
        for name in types.aliases.get(first, (first,)) if shrunk else ():
            kept[name] = shrunk
            shapes[name] = [len(axis) for axis in axes]
    return Plan(kept, shapes, groups_of(grouping, cut), **facts)


def scores_of(grouping: Grouping, values: Scores) -> dict[str, list[float] | None]:
    """What each group's channels were ranked by, from [variables] numbers; None where one is not a number."""
    found: dict[str, list[float] | None] = {}
    for group in grouping.groups:
        own = values[group.variables]
        found[group.name] = None if np.isnan(own).any() else [float(f"{value:.6g}") for value in own.tolist()]
    return found


def groups_of(grouping: Grouping, cut: Cut) -> tuple[GroupRow, ...]:
    """Every group with what stays of it, in network order."""
    return tuple(
        GroupRow(
            group.name, group.width, int(cut.alive[group.variables].sum()), group.exact,
            tuple((member.tensor, member.axis) for member in group.members),
        )
        for group in grouping.groups
    )  # fmt: skip


def _lines(data: dict[str, Any]) -> str:
    """JSON with one line per tensor and per group, so that a diff shows what changed and an editor stays usable."""
    parts = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{rows}\n }}")
        elif isinstance(value, list) and value:
            rows = ",\n".join(f"  {json.dumps(item)}" for item in value)
            parts.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def weights_sha256(model: nn.Module) -> str:
    """Hash of names, shapes, types and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):  # of get_extra_state
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        data = tensor.detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(_bytes_of(data)).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    return torch.uint8 if tensor.dtype != torch.bool else torch.bool


def _index(indices: list[int], like: Tensor) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=like.device)


def _table(name: str, value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise PlanError(f'{source}: "{name}" must be a table, not {type(value).__name__}')
    return value or {}


def _scores(table: Any, source: str) -> dict[str, list[float] | None] | None:
    if table is None:
        return None
    found = _table("scores", table, source)
    for own in found.values():
        if own is not None and not (isinstance(own, list) and all(type(value) in (int, float) for value in own)):
            raise PlanError(f'{source}: "scores" must be a table from group to a list of numbers, or null')
    return found


def _groups(rows: Any, source: str) -> tuple[GroupRow, ...]:
    try:
        return tuple(
            GroupRow(g["name"], g["width"], g["kept"], g["exact"], tuple((m[0], m[1]) for m in g["members"]))
            for g in rows
        )
    except (TypeError, KeyError, IndexError) as error:
        raise PlanError(
            f'{source}: "groups" must be a list of tables with name, width, kept, exact and members ({error!r})'
        ) from error


def _axes(name: str, axes: Any, source: str) -> dict[int, list[int]]:
    if not isinstance(axes, dict):
        raise PlanError(f'{source}: "kept" of {name} must be a table from axis to indices')
    result = {}
    for axis, indices in axes.items():
        whole = isinstance(indices, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
        if not re.fullmatch("0|[1-9][0-9]{0,2}", str(axis)) or not whole:
            raise PlanError(f"{source}: {name}, axis {axis!r}: wanted an axis number and a list of whole numbers")
        result[int(axis)] = indices
    return result


def _positions(name: str, channels: Sequence[int]) -> list[int]:
    try:
        if any(isinstance(channel, bool | np.bool_) for channel in channels):
            raise TypeError
        return sorted(operator.index(channel) for channel in channels)
    except TypeError:
        raise PlanError(f"{name}: channels are positions, as whole numbers; got {channels!r}") from None


def _check_indices(name: str, axis: int, indices: list[int], shape: list[int]) -> None:
    where = f"{name}, axis {axis}"
    if axis >= len(shape):
        raise PlanError(f"{where}: the tensor has only {len(shape)} axes")
    if not indices:
        raise PlanError(f"{where}: keeps 0 of {shape[axis]} indices; at least 1 is needed")
    if any(b <= a for a, b in itertools.pairwise(indices)):
        raise PlanError(f"{where}: kept indices must be ascending, each once")
    if indices[0] < 0 or indices[-1] >= shape[axis]:
        raise PlanError(
            f"{where}: index {indices[-1] if indices[0] >= 0 else indices[0]} is outside 0..{shape[axis] - 1}"
        )


def _check_ties(types: Types, kept: Mapping[str, dict[int, list[int]]]) -> None:
    for first, names in types.aliases.items():
        for name in names:
            if kept.get(name) != kept.get(first):
                raise PlanError(f"{first} and {name} are one tensor in this model, but the plan cuts them differently")


def _check_coupling(
    types: Types, alive: npt.NDArray[np.bool_], masks: dict[tuple[str, int], npt.NDArray[np.bool_]]
) -> None:
    """Every index lives exactly if its variables do; an edit that breaks a group is named."""
    for (name, axis), mask in masks.items():
        terms = types.tensors[name][axis]
        implied = types.solution.kept(terms, alive)
        wrong = np.flatnonzero(implied != mask)
        if not wrong.size:
            continue
        index = int(wrong[0])
        factors = types.solution.factors(terms)[index]
        if not (factors >= 0).any():
            cause = types.store.cause(int(terms[index]))
            raise PlanError(f"{name}, axis {axis}: index {index} cannot go: {cause.reason}")
        partner = next(
            f"{other}, axis {position}"
            for (other, position), kept in masks.items()
            if (np.isin(types.solution.factors(types.tensors[other][position])[kept], factors[factors >= 0])).any()
        )
        raise PlanError(
            f"{name}, axis {axis}: index {index} is removed, but {partner} keeps an index of the same channel. "
            "Coupled indices go together; edit all members of the group."
        )
