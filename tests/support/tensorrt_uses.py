"""Read every use of TensorRT from source code and check it against a module.

    python -m tests.support.tensorrt_uses MODULE < USES.json

The uses are read from the source, so no list of them can become outdated. Expressions whose type
cannot be inferred must be annotated, or are reported as problems.
"""

import ast
import importlib
import inspect
import json
import operator
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass
class Use:
    """One use of TensorRT or CUDA in our source."""

    where: str
    how: str
    """One of get, set, call, override, compare and int."""
    owner: str
    """Class of the variable it is used on. Empty for the module itself."""
    name: str
    positional: list[str | None] = field(default_factory=list)
    """Arguments, or the assigned value: `type X`, `value A.B`, or None if not of TensorRT."""
    keywords: list[str] = field(default_factory=list)
    returns: str | None = None
    """The class that our annotation declares as the result."""


class Kind(NamedTuple):
    """Inferred type of an expression with respect to TensorRT."""

    sort: str
    """One of: library, cuda (a path from the module); typed (an instance of a TensorRT class); own
    (of a class of ours); member (an attribute of a typed one); unclear (of TensorRT, no type)."""
    name: str = ""
    owner: str = ""
    use: Use | None = None
    """The call or attribute that it comes from."""


LIBRARY, UNCLEAR = Kind("library"), Kind("unclear")
Kinds = dict[str, Kind | None]


class Reader(ast.NodeVisitor):
    """Visitor of one module. Visiting an expression returns its `Kind`, or None."""

    def __init__(self, path: str, functions: dict[str, ast.expr | None]) -> None:
        self.file = Path(path).name
        self.functions = functions
        """Return annotation of each of our functions, methods as `Class.method`."""
        self.uses: list[Use] = []
        self.cuda: list[Use] = []
        self.problems: list[str] = []
        self.scopes: list[Kinds] = [{}]
        self.fields: dict[str, Kinds] = {}
        """Fields of our classes."""
        self.bases: dict[str, str] = {}
        """Our classes that extend a class of TensorRT."""
        self.classes: list[str] = []

    def where(self, node: ast.AST) -> str:
        return f"{self.file}:{node.lineno}"

    def problem(self, node: ast.AST, text: str) -> None:
        self.problems.append(f"{self.where(node)}: {text}: {ast.unparse(node)}")

    def record(self, node: ast.AST, how: str, kind: Kind, **facts: Any) -> Use:
        use = Use(self.where(node), how, kind.owner, kind.name, **facts)
        (self.cuda if kind.sort == "cuda" else self.uses).append(use)
        return use

    def annotated(self, annotation: ast.expr | None) -> Kind | None:
        if annotation is None:
            return None
        text = ast.unparse(annotation)
        if found := re.fullmatch(r"trt\.(\w+)( \| None)?", text):
            return Kind("typed", found[1])
        if text == "Any" or re.search(r"\btrt\.", text):
            return UNCLEAR
        return Kind("own", text) if text in self.fields else None

    def returned(self, function: str) -> Kind | None:
        if function == "load_library":
            return LIBRARY
        return self.annotated(self.functions.get(function))

    def bind(self, target: ast.expr, kind: Kind | None) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = kind
        elif isinstance(target, ast.Attribute):
            place = self.visit(target)
            if place and place.sort == "field":
                self.fields[place.owner].setdefault(place.name, kind)
            elif place and place.use:
                place.use.positional = [_argument(kind)]
        elif isinstance(target, ast.Tuple | ast.List | ast.Starred):
            for part in getattr(target, "elts", None) or [target.value]:
                self.bind(part, kind and UNCLEAR)
        else:
            self.visit(target)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if (node.module, alias.name) == ("cuda.bindings", "runtime"):
                self.scopes[-1][alias.asname or alias.name] = Kind("cuda")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.fields[node.name] = {}
        for base in map(self.visit, node.bases):
            if base and base.sort == "library":
                self.bases[node.name] = base.name
        self.classes.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        a = node.args
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        scope = {one.arg: self.annotated(one.annotation) for one in every}
        inside = self.classes[-1] if self.classes else ""
        if inside and every and every[0].arg == "self":
            scope["self"] = Kind("own", inside)
            if inside in self.bases and not node.name.startswith("_"):
                base = Kind("library", node.name, self.bases[inside])
                self.record(node, "override", base, positional=[None] * (len(every) - 1))
        classes, self.classes = self.classes, []
        self.scopes.append(scope)
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()
        self.classes = classes

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        kind = self.annotated(node.annotation)
        value = self.visit(node.value) if node.value else None
        if kind and kind.sort == "typed" and value:
            if value.use and value.use.how == "call":
                value.use.returns = kind.name
            elif value.sort == "typed" and value.name != kind.name:
                self.problem(node, f"a {value.name} is annotated as another class")
        if self.classes and isinstance(node.target, ast.Name):
            self.fields[self.classes[-1]][node.target.id] = kind
        else:
            self.bind(node.target, kind)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            if both and len(target.elts) == len(node.value.elts):
                for part, value in zip(target.elts, node.value.elts, strict=True):
                    self.bind(part, self.visit(value))
            else:
                value = self.visit(node.value) if target is node.targets[0] else value
                self.bind(target, value)

    def visit_For(self, node: ast.For) -> None:
        kind = self.visit(node.iter)
        self.bind(node.target, kind and UNCLEAR)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        kind = self.visit(node.iter)
        self.bind(node.target, kind and UNCLEAR)
        for condition in node.ifs:
            self.visit(condition)

    def visit_withitem(self, node: ast.withitem) -> None:
        kind = self.visit(node.context_expr)
        if node.optional_vars:
            self.bind(node.optional_vars, kind and UNCLEAR)

    def visit_Name(self, node: ast.Name) -> Kind | None:
        if node.id == "library":
            return LIBRARY
        return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)

    def visit_Attribute(self, node: ast.Attribute) -> Kind | None:
        base = self.visit(node.value)
        how = "get" if isinstance(node.ctx, ast.Load) else "set"
        if base is None:
            return None
        if base.sort in ("library", "cuda"):
            path = Kind(base.sort, f"{base.name}.{node.attr}".strip("."))
            self.record(node, how, path)
            return path
        if base.sort == "typed":
            member = Kind("member", node.attr, base.name)
            return member._replace(use=self.record(node, how, member))
        if base.sort == "own":
            return self.of_ours(node, base.name)
        if base.sort in ("unclear", "member"):
            self.problem(node, "annotate the variable that this attribute is used on")
        return None

    def of_ours(self, node: ast.Attribute, owner: str) -> Kind | None:
        if not isinstance(node.ctx, ast.Load):
            return Kind("field", node.attr, owner)
        known = self.fields.get(owner, {})
        if node.attr in known:
            return known[node.attr]
        if f"{owner}.{node.attr}" in self.functions:
            return Kind("method", f"{owner}.{node.attr}")
        if owner in self.bases:
            self.record(node, "get", Kind("member", node.attr, self.bases[owner]))
        return None

    def visit_Call(self, node: ast.Call) -> Kind | None:
        called = self.visit(node.func)
        arguments = [self.visit(argument) for argument in node.args]
        for keyword in node.keywords:
            self.visit(keyword.value)
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if called is None:
            if name in ("getattr", "setattr", "hasattr", "vars") and any(arguments):
                self.problem(node, "a use that cannot be read")
            if name == "int" and arguments[0] and arguments[0].sort == "library":
                self.record(node, "int", arguments[0])
            return Kind("own", name) if name in self.fields else self.returned(name or "")
        if called.sort == "method":
            return self.returned(called.name)
        if called.sort not in ("library", "member", "cuda"):
            return called
        use = self.record(
            node,
            "call",
            called,
            positional=[_argument(kind) for kind in arguments],
            keywords=[keyword.arg or "**" for keyword in node.keywords],
        )
        return None if called.sort == "cuda" else UNCLEAR._replace(use=use)

    def visit_Compare(self, node: ast.Compare) -> None:
        ordering = isinstance(node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE)
        for kind in map(self.visit, (node.left, *node.comparators)):
            if ordering and kind and kind.sort == "library":
                self.record(node, "compare", kind)

    def visit_Subscript(self, node: ast.Subscript) -> Kind | None:
        self.visit(node.slice)
        return self.visit(node.value) and UNCLEAR

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Kind | None:
        kind = self.visit(node.value)
        self.bind(node.target, kind)
        return kind

    def visit_BoolOp(self, node: ast.BoolOp) -> Kind | None:
        return next(filter(None, list(map(self.visit, node.values))), None)

    def visit_IfExp(self, node: ast.IfExp) -> Kind | None:
        self.visit(node.test)
        return next(filter(None, [self.visit(node.body), self.visit(node.orelse)]), None)

    def visit_Starred(self, node: ast.Starred) -> Kind | None:
        return self.visit(node.value)

    def display(self, node: ast.expr) -> Kind | None:
        """Return unclear for a collection if one of its parts is TensorRT's."""
        children = sorted(ast.iter_child_nodes(node), key=_generators_first)
        return UNCLEAR if any(list(map(self.visit, children))) else None

    visit_Tuple = visit_List = visit_Set = visit_Dict = display
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = display


def _generators_first(node: ast.AST) -> bool:
    return not isinstance(node, ast.comprehension)


def _argument(kind: Kind | None) -> str | None:
    if kind and kind.sort == "typed":
        return f"type {kind.name}"
    return f"value {kind.name}" if kind and kind.sort == "library" and kind.name else None


def read(sources: dict[str, str]) -> tuple[list[Use], list[Use], list[str]]:
    """Return uses of TensorRT, uses of CUDA, and problems."""
    trees = {path: ast.parse(text) for path, text in sources.items()}
    functions = {name: f.returns for tree in trees.values() for name, f in _functions(tree)}
    uses, cuda, problems = [], [], []
    for path, tree in trees.items():
        reader = Reader(path, functions)
        reader.visit(tree)
        uses += reader.uses
        cuda += reader.cuda
        problems += reader.problems
    return uses, cuda, problems


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(tree):
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield f"{prefix}{child.name}", child


# The code below runs in the process that has the bindings.


def signatures(function: Any) -> list[tuple[list[tuple[str, str, bool]], str]]:
    """Parse pybind's docstring: for each overload, name, type and default of parameters, and the
    result."""
    found = []
    for line in (function.__doc__ or "").splitlines():
        match = re.fullmatch(rf"(?:\d+\. )?{function.__name__}\((.*)\) -> (.*)", line)
        if match:
            parts = re.split(r", (?![^\[<(]*[\]>)])", match[1]) if match[1] else []
            named = [part.partition(": ") for part in parts if part not in ("/", "*")]
            found.append(([(n, t.partition(" = ")[0], " = " in t) for n, _, t in named], match[2]))
    return found


def last(name: str) -> str:
    """Map a C++ name to Python: `nvonnxparser::IParserError` becomes `ParserError`."""
    return re.split(r"\.|::I?", name)[-1]


def resolved(module: Any, use: Use) -> Any:
    target = getattr(module, use.owner) if use.owner else module
    for part in use.name.split("."):
        target = getattr(target, part)
    return target


def fits(module: Any, argument: str | None, wanted: str) -> bool:
    if argument is None:
        return True
    sort, _, name = argument.partition(" ")
    value = resolved(module, Use("", "", "", name))
    kind = value if sort == "type" or isinstance(value, type) else type(value)
    return last(wanted) in {base.__name__ for base in kind.__mro__}


def takes(module: Any, use: Use, target: Any) -> list[str]:
    """Return the problems of a call."""
    bound = bool(use.owner)
    if isinstance(target, type):
        target, bound = target.__init__, True
    if not (known := signatures(target)):
        try:
            inspect.signature(target).bind(*use.positional, **dict.fromkeys(use.keywords))
        except (TypeError, ValueError) as error:
            return [str(error)]
        return []
    for parameters, _ in known:
        free = parameters[bound:]
        given, rest = free[: len(use.positional)], free[len(use.positional) :]
        if (
            len(use.positional) <= len(free)
            and {*use.keywords} <= {name for name, _, _ in rest}
            and {name for name, _, default in rest if not default} <= {*use.keywords}
            and all(fits(module, a, t) for a, (_, t, _) in zip(use.positional, given, strict=True))
        ):
            break
    else:
        return [f"is called with {use.positional} {use.keywords}, takes {known}"]
    results = {last(result) for _, result in known}
    made = {last(use.name)} if target.__name__ == "__init__" else results
    if use.returns and use.returns not in made:
        return [f"returns {made}, we say {use.returns}"]
    return []


def cannot_be_set(module: Any, use: Use, target: Any) -> list[str]:
    if getattr(target, "fset", None) is None:
        return ["cannot be set"]
    wanted = re.search(r"arg1: ([\w.]+)", target.fset.__doc__)[1]
    return [] if all(fits(module, a, wanted) for a in use.positional) else [f"takes {wanted}"]


def wrong(module: Any, use: Use) -> list[str]:
    """Return the reasons why `module` does not support the use."""
    target = resolved(module, use)
    if use.how == "set":
        return cannot_be_set(module, use, target)
    if use.how == "compare":
        return [] if operator.le(target, target) else ["has no order"]
    if use.how == "int":
        return [] if isinstance(int(target), int) else ["is no number"]
    if use.how == "override":
        counts = {len(parameters) - 1 for parameters, _ in signatures(target)}
        mine = len(use.positional)
        return [] if counts == {mine} else [f"is overridden with {mine} parameters, has {counts}"]
    return takes(module, use, target) if use.how == "call" else []


def check(module: Any, uses: list[Use]) -> list[str]:
    problems = []
    for use in uses:
        try:
            reasons = wrong(module, use)
        except AttributeError as error:
            reasons = [str(error)]
        what = f"{use.owner}.{use.name}".strip(".")
        problems += [f"{use.where}: {use.how} {what}: {reason}" for reason in reasons]
    return problems


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    asked = {name: [Use(**use) for use in uses] for name, uses in json.load(sys.stdin).items()}
    problems = {name: check(module, uses) for name, uses in asked.items()}
    numbers = [str(module.nptype(getattr(module, t))) for t in ("uint8", "int32", "float32")]
    print(json.dumps({"version": module.__version__, "types": numbers, "problems": problems}))


if __name__ == "__main__":
    main()
