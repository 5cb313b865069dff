"""Read a pickle stream without running it: which names it uses, what it would call, which tensors it would make.

The machine below does to *descriptions* what torch's weights-only unpickler does to objects, opcode by opcode, so
what it reports is what torch would do. Opcodes that torch does not know are refused here too.
"""

from __future__ import annotations

import pickletools
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from slimc.errors import LoadError

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class Global:
    """A class or function that the file names, as ``module.name``."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """Bytes of a tensor: entry ``data/<key>``, with the number of elements that the pickle claims."""

    key: str
    type: str
    elements: int


@dataclass(eq=False)
class Made:
    """An object that loading would make; identity matters, content does not."""

    by: str
    built: bool = False


@dataclass(frozen=True)
class Call:
    """A call that loading would make: ``function(*arguments)``, or ``function.__new__`` when ``new``."""

    function: Global
    arguments: tuple[Any, ...]
    new: bool


@dataclass
class Program:
    """Everything a pickle stream would do that depends on names."""

    globals: set[Global] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    built: set[str] = field(default_factory=set)
    storages: list[Storage] = field(default_factory=list)


def scan(stream: bytes, label: str) -> Program:
    """Describe a pickle stream; refuses opcodes that torch's weights-only unpickler does not have."""
    machine = _Machine(label)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            step = _STEPS.get(opcode.name)
            if step is None:
                raise LoadError(_unknown_opcode(label, opcode.name, machine.protocol))
            step(machine, argument)
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, UnicodeDecodeError, OverflowError) as error:
        raise LoadError(
            f"{label}: the description of the model (data.pkl) is malformed ({error}). Save the model again."
        ) from error
    return machine.program


def shortened(value: Any) -> str:
    """A description for messages: tuples that share parts are short in the file and endless when written out."""
    short = reprlib.Repr()
    short.maxlevel = 3
    return short.repr(value)


def _unknown_opcode(label: str, opcode: str, protocol: int) -> str:
    if protocol > 2:
        return (
            f"{label}: saved with pickle protocol {protocol} (opcode {opcode}); only protocol 2, which torch.save uses "
            "by default, can be read without running code. Save again without pickle_protocol=."
        )
    return f"{label}: the pickle uses opcode {opcode}, which torch.save never writes. The file is not trusted."


class _Machine:
    """A stack of descriptions: tuples, strings and numbers as they are, everything else as a stand-in."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.protocol = 0
        self.program = Program()
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def proto(self, argument: int) -> None:
        self.protocol = argument

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def tuple_from_mark(self, _: Any) -> None:
        items = tuple(self.pop_mark())
        self.stack.append(items)

    def tuple_of(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def drop(self, count: int) -> None:
        del self.stack[-count:]
        self.stack[-1]  # the container must be there

    def drop_marked(self, _: Any) -> None:
        self.pop_mark()
        self.stack[-1]

    def global_(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[(module, name)]
        module = IMPORT_MAPPING.get(module, module)
        if not _MODULE.fullmatch(module) or not _NAME.fullmatch(name):
            raise LoadError(f"{self.label}: names {argument!r}, which is not a class or function. Not loaded.")
        named = Global(module, name)
        self.program.globals.add(named)
        self.stack.append(named)

    def call(self, *, new: bool) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global):
            what = shortened(function)
            raise LoadError(f"{self.label}: the pickle calls something that is not a name ({what}). Not loaded.")
        if not isinstance(arguments, tuple):
            raise LoadError(f"{self.label}: the pickle calls {function} without an argument list. Not loaded.")
        self.program.calls.append(Call(function, arguments, new))
        self.stack.append(Made(str(function)))

    def build(self, _: Any) -> None:
        self.stack.pop()
        target = self.stack[-1]
        # A second BUILD could replace __setstate__ by the first and so call what the file likes.
        if not isinstance(target, Made) or target.built:
            what = shortened(target)
            raise LoadError(f"{self.label}: the pickle sets the state of {what} in a way that no saved model does.")
        target.built = True
        self.program.built.add(target.by)

    def persistent(self, _: Any) -> None:
        match self.stack.pop():
            case ("storage", Global() as kind, str(key), str(), int(elements)) if elements >= 0:
                storage = Storage(key, str(kind), elements)
            case other:
                what = shortened(other)
                raise LoadError(f"{self.label}: a tensor's storage is described as {what}. Save the model again.")
        self.program.storages.append(storage)
        self.stack.append(storage)


_Step = Callable[[_Machine, Any], None]


def _constant(value: Any) -> _Step:
    return lambda machine, _: machine.push(value)


def _container(kind: str) -> _Step:
    return lambda machine, _: machine.push(Made(kind, built=True))


_STEPS: dict[str, _Step] = {
    "PROTO": _Machine.proto,
    "STOP": lambda machine, _: None,
    "GLOBAL": _Machine.global_,
    "REDUCE": lambda machine, _: machine.call(new=False),
    "NEWOBJ": lambda machine, _: machine.call(new=True),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_from_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "EMPTY_TUPLE": _constant(()),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_LIST": _container("list"),
    "EMPTY_DICT": _container("dict"),
    "EMPTY_SET": _container("set"),
    "APPEND": lambda machine, _: machine.drop(1),
    "APPENDS": _Machine.drop_marked,
    "SETITEM": lambda machine, _: machine.drop(2),
    "SETITEMS": _Machine.drop_marked,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "BININT": _Machine.push,
    "BININT1": _Machine.push,
    "BININT2": _Machine.push,
    "LONG1": _Machine.push,
    "BINFLOAT": _Machine.push,
    "BINUNICODE": _Machine.push,
    "SHORT_BINSTRING": _Machine.push,
}
