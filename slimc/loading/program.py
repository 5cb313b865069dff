"""The JSON inside a .pt2 file, checked before torch builds a graph from it.

torch.export.load trusts this text (2.14): symbolic sizes go through sympy's ``eval``, and guards and node names become
Python source that is executed; an operator is looked up as any attribute below ``torch`` (``torch.os.system`` is one),
where only torch's verifier stands in the way. So every name must be an identifier, every size arithmetic, and every
operator one of PyTorch's own.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Iterator
from typing import Any

from slimc.errors import LoadError

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.[A-Za-z_]\w*\.[A-Za-z_]\w*"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|abs|lshift|rshift)"
    r"|math\.(ceil|floor|trunc|sqrt)"
    r"|torch\.(sym_int|sym_float|sym_max|sym_min|sym_not|sym_ite|sym_sum|_sym_sqrt)",
    re.ASCII,
)
# reads a file that the program names; no network needs it
_FORBIDDEN_OPERATORS = ("torch.ops.aten.from_file.",)
_PATH = re.compile(r"[^\"'\\\x00-\x1f\x7f]*")
"""torch writes names that are no identifiers into source between quotes."""
_TREE_TYPES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
_REFUSED_KEYS = frozenset({"as_custom_obj", "custom_obj", "as_graph", "as_operator", "as_opaque", "as_complex"})
_NAME_KEYS = frozenset({"name", "as_name"})
_NAME_TABLES = frozenset(
    {"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "range_constraints"}
)
_PATH_KEYS = frozenset(
    {"fqn", "parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "custom_obj_name"}
)
_KEPT_METADATA = frozenset({"stack_trace", "nn_module_stack", "torch_fn"})
_MAX_EXPRESSION = 20_000
_SYMBOL = re.compile(r"[a-z]{1,3}\d+", re.ASCII)
_EXPONENTS = frozenset({"Integer(-1)", "Integer(2)", "Integer(-2)", "Integer(3)", "Rational(1, 2)"})
_SIZE_FUNCTIONS = frozenset({
    "Integer", "Rational", "Float", "Add", "Mul", "Max", "Min", "floor", "ceiling", "FloorDiv",
    "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "RoundToInt", "ToFloat", "Identity", "Not", "And", "Or", "Eq",
    "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan",
    "GreaterThan",
})  # fmt: skip


def checked_program(text: bytes, label: str) -> tuple[bytes, tuple[str, ...]]:
    """Check models/model.json; returns it without guards, foreign metadata and devices, and notes about changes."""
    program = parse(text, label)
    _check(program, "program", label)
    devices = sorted(set(_move_to_cpu(program)))
    if isinstance(program, dict):
        program["guards_code"] = []  # source text that torch would execute; slimc checks inputs by itself
    notes = tuple(f"the program was exported for {device}; it was read for the CPU" for device in devices)
    return json.dumps(program).encode(), notes


def parse(text: bytes, label: str) -> Any:
    """Parse one JSON description."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{label}: a description in the file is no valid JSON ({error}). Export it again.") from error


def _check(value: Any, key: str, label: str) -> None:
    if isinstance(value, list):
        for part in value:
            _check(part, key, label)
    if not isinstance(value, dict):
        return
    if key == "metadata":
        for name in [name for name in value if name not in _KEPT_METADATA]:
            del value[name]
    for name, part in value.items():
        _check_entry(name, part, label)
        if key in _NAME_TABLES:
            _check_identifier(name, label)
        _check(part, name, label)


def _check_entry(key: str, value: Any, label: str) -> None:
    if key in _REFUSED_KEYS and value is not None:
        raise LoadError(f"{label}: the program uses {key}, which is not supported. Export a plain tensor program.")
    if key == "target" and isinstance(value, str):
        _check_operator(value, label)
    elif key in _NAME_KEYS and isinstance(value, str):
        _check_identifier(value, label)
    elif key in _PATH_KEYS and isinstance(value, str) and not _PATH.fullmatch(value):
        raise LoadError(f"{label}: {value!r} is no module path. The file was changed after export; not loaded.")
    elif key == "forward_arg_names" and isinstance(value, list):
        for name in value:
            _check_identifier(name, label)
    elif key == "expr_str":
        _check_expression(value, label)
    elif key in ("in_spec", "out_spec") and value:
        _check_tree(parse(str(value).encode(), label), key, label)


def _check_operator(target: str, label: str) -> None:
    if _OPERATOR.fullmatch(target) and not target.startswith(_FORBIDDEN_OPERATORS):
        return
    raise LoadError(
        f"{label}: the program calls {target!r}, which is not an operator of PyTorch (aten, prims, torchvision). "
        + (
            "Export it as torch.export.export(...).run_decompositions({}), which takes it apart"
            if "higher_order" in target
            else "Export the model without custom operators"
        )
        + ", or give the original nn.Module."
    )


def _check_identifier(name: Any, label: str) -> None:
    if isinstance(name, str) and (not name or (name.isidentifier() and name.isascii() and not keyword.iskeyword(name))):
        return
    raise LoadError(f"{label}: {name!r} is used as a name and would become source text. Not loaded.")


def _check_expression(text: Any, label: str) -> None:
    """A size, as ``2*s0 + 1`` or as sympy writes it: ``Add(Symbol('s77', positive=True), Integer(-3))``."""
    try:
        fine = isinstance(text, str) and len(text) <= _MAX_EXPRESSION and _is_size(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        fine = False
    if not fine:
        raise LoadError(f"{label}: the size {str(text)[:80]!r} is not an arithmetic expression. Not loaded.")


def _is_size(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=int() | float()):
            return True
        case ast.Name(id=name):
            return _SYMBOL.fullmatch(name) is not None or name in ("int_oo", "oo", "true", "false")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _is_size(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv() | ast.Div(), right=right):
            return _is_size(left) and _is_size(right)
        case ast.Compare(left=left, comparators=others):
            return all(map(_is_size, [left, *others]))
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=assumptions):
            return _SYMBOL.fullmatch(name) is not None and _are_flags(assumptions)
        case ast.Call(func=ast.Name(id="Pow"), args=[base, exponent], keywords=[]):
            return _is_size(base) and ast.unparse(exponent) in _EXPONENTS  # 9**9**9 would be computed
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=flags):
            return name in _SIZE_FUNCTIONS and all(map(_is_size, arguments)) and _are_flags(flags)
    return False


def _are_flags(keywords: list[ast.keyword]) -> bool:
    return all(isinstance(word.value, ast.Constant) and isinstance(word.value.value, bool) for word in keywords)


def _check_tree(spec: Any, key: str, label: str) -> None:
    """The nesting of inputs or outputs: tuples, lists and dictionaries with plain keys.

    Those of inputs by name, the second part of all inputs, become arguments of a function.
    """
    match spec:
        case [1, {} as root]:
            waiting = [root]
        case _:
            raise LoadError(f"{label}: the nesting of inputs is described as {str(spec)[:80]!r}. Export again.")
    named = root.get("children_spec", [])[1:] if key == "in_spec" else []
    while waiting:
        node = waiting.pop()
        kind, context = node.get("type"), node.get("context")
        if kind not in _TREE_TYPES or "__enum__" in str(context):
            raise LoadError(
                f"{label}: inputs or outputs are nested in {kind!r}; only tuples, lists and dictionaries can be read. "
                "Export a model that takes and returns those."
            )
        if kind in ("builtins.dict", "collections.OrderedDict") and context:
            for name in parse(str(context).encode(), label):
                if any(node is part for part in named):
                    _check_identifier(name, label)
                elif not (type(name) is int or (isinstance(name, str) and _PATH.fullmatch(name))):
                    raise LoadError(f"{label}: {name!r} is a key of an input or output; wanted text or a number.")
        waiting.extend(child for child in node.get("children_spec", []) if isinstance(child, dict))


def _move_to_cpu(value: Any) -> Iterator[str]:
    """Replace every device by the CPU, so that programs exported on another machine load here."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and set(value) == {"type", "index"} and isinstance(value["type"], str):
        if value["type"] not in ("cpu", "meta"):
            yield value["type"]
        value.update(type="cpu", index=None)
    for part in parts:
        yield from _move_to_cpu(part)


def checked_payloads(text: bytes, sizes: dict[str, int], label: str) -> tuple[bytes, frozenset[str]]:
    """Check a table of weights or constants against the bytes that are there; returns it and the entries it uses.

    ``sizes`` maps the entries of the table's folder to their bytes.
    """
    table = parse(text, label)
    config = table.get("config") if isinstance(table, dict) else None
    if not isinstance(config, dict):
        raise LoadError(f"{label}: the table of weights is malformed. Export again.")
    used: set[str] = set()
    for name, payload in config.items():
        path, meta = (
            (payload.get("path_name"), payload.get("tensor_meta")) if isinstance(payload, dict) else (None, None)
        )
        if not isinstance(payload, dict) or payload.get("use_pickle") or not isinstance(meta, dict):
            raise LoadError(
                f"{label}: {name} is stored as a pickle, which may run code. Export the model with plain dense tensors."
            )
        if not isinstance(path, str) or not re.fullmatch(r"(weight|tensor)_\d+", path) or path not in sizes:
            raise LoadError(
                f"{label}: {name} is stored as {path!r}, which is no plain tensor of this file. Not loaded."
            )
        if not _PATH.fullmatch(name):
            raise LoadError(f"{label}: {name!r} is no module path. The file was changed after export; not loaded.")
        if _elements(meta, name, label) > sizes[path]:
            raise LoadError(f"{label}: {name} claims more elements than the {sizes[path]} bytes it has. Not loaded.")
        used.add(path)
    list(_move_to_cpu(table))
    return json.dumps(table).encode(), frozenset(used)


def _elements(meta: dict[str, Any], name: str, label: str) -> int:
    product = 1
    for size in meta.get("sizes", ()):
        match size:
            case {"as_int": int(width)} if width >= 0 and len(size) == 1:
                product *= width
            case _:
                raise LoadError(f"{label}: {name} has the size {size!r}; weights have fixed sizes. Export again.")
    return product
