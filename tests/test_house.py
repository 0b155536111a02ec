"""The house rules of faasd_async.py: each is a function from a source to lines and what to do.

While the file is being written, `python tests/test_house.py FILE` prints all findings of all rules
for FILE and exits 1 if there are any.
"""

import ast
import builtins
import io
import re
import subprocess
import symtable
import sys
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "faasd_async.py"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

# In the order of reading. One whose capability is not there is absent.
SECTIONS = (
    "Constants", "Errors", "Values", "URLs and hosts", "Files and secrets", "Cron expressions",
    "Configuration", "Configuration file", "Domain data", "Rules", "Schedule rules", "Logging, sd_notify", "Metrics",
    "Threads and tasks", "Timers", "Queue seam",
    "SQLite index", "SQLite file", "SQLite limits", "SQLite statements", "SQLite work", "SQLite records",
    "SQLite schedules", "SQLite copies", "SQLite move", "SQLite writer", "SQLite queue",
    "NATS messages", "NATS subjects", "NATS wire", "NATS connection", "NATS stream", "NATS documents", "NATS lanes",
    "NATS turns", "NATS consumers", "NATS names", "NATS records", "NATS lists",
    "NATS work", "NATS limits", "NATS outcomes",
    "NATS owners", "NATS claims", "NATS taker", "NATS operators", "NATS intake", "NATS takeover",
    "NATS recovery", "NATS room", "NATS upkeep", "NATS figures", "NATS queue",
    "HTTP failures", "HTTP parsing", "HTTP connections", "HTTP over TLS", "HTTP pool", "HTTP messages", "HTTP client",
    "Abandoned programs", "Commands", "Function limits", "Functions", "Live output", "Jobs", "Deliveries", "Consumer",
    "Intake", "HTTP answers",
    "HTTP requests", "HTTP exchanges", "HTTP conversations", "HTTP server", "HTTP front", "Function routes",
    "Operator routes", "Live view", "OpenFaaS routes", "Page style", "Page script", "Page views", "Page actions",
    "Operator's page", "Schedule steps", "Schedules", "Routes and sockets", "Daemon", "Client", "Client commands",
    "Operator commands", "Schedule commands", "Service commands", "Move command", "Manual page", "Command line",
)  # fmt: skip
# What they read can be anything, so they may return Any.
PARSERS = ("Values", "Cron expressions", "Configuration", "Configuration file")
COLUMNS = 100
NAME = r"(?<![\w.])[A-Za-z_]\w*"  # in an annotation; of `web.Request` only `web`

Function = ast.FunctionDef | ast.AsyncFunctionDef
Container = ast.Tuple | ast.List | ast.Set | ast.Dict | ast.Call
Branch = ast.If | ast.For | ast.AsyncFor | ast.While | ast.ExceptHandler | ast.match_case
Findings = Iterator[tuple[int, str]]


class Source:
    """A file with what the rules look at."""

    def __init__(self, text: str) -> None:
        self.lines = text.rstrip("\n").split("\n")
        self.tree = ast.parse(text)
        self.nodes = list(ast.walk(self.tree))
        self.functions = [node for node in self.nodes if isinstance(node, Function)]
        self.classes = [node for node in self.nodes if isinstance(node, ast.ClassDef)]
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = [token for token in tokens if token.type == tokenize.COMMENT]
        self.banners = [token for token in self.comments if token.start[1] == 0 and re.match(r"#\s*--", token.string)]
        self.sections = self.parts("# --- ", 1, len(self.lines))

    def parts(self, prefix: str, first: int, last: int) -> list[tuple[str, int, int]]:
        """What banners divide the lines from `first` to `last` into: name, first and last line."""
        lines = [token.start[0] for token in self.banners if token.string.startswith(prefix)]
        starts = [line for line in lines if first <= line <= last]
        ends = [line - 1 for line in starts[1:]] + [last]
        names = [self.lines[line - 1].strip("#- ") for line in starts]
        return list(zip(names, starts, ends, strict=False))

    def section(self, line: int) -> int:
        """The index of the section that a line is in, -1 before the first."""
        return sum(first <= line for _, first, _ in self.sections) - 1

    def density(self, node: ast.AST, first: int, last: int) -> float:
        """Expression nodes in a tree for each of its lines that is not blank or a comment."""
        lines = (line.strip() for line in self.lines[first - 1 : last])
        code = sum(bool(line) and not line.startswith("#") for line in lines)
        return sum(isinstance(item, ast.expr) for item in ast.walk(node)) / max(1, code)


def size(node: ast.stmt) -> int:
    """Lines from the `def` or `class` to the last one."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(function: Function) -> list[ast.arg]:
    """What a function takes."""
    return [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]


def methods(owner: ast.ClassDef) -> list[Function]:
    """The functions of a class."""
    return [node for node in owner.body if isinstance(node, Function)]


# ---- sections ------------------------------------------------------------------------------------


def banner(name: str) -> str:
    """The line that opens a section."""
    return f"# --- {name} ".ljust(COLUMNS, "-")


def banners_stand_in_the_order_of_reading(source: Source) -> Findings:
    """Sections are those of the list; a sub-banner is `# -- NAME` with any name."""
    rest = list(SECTIONS)
    for token in source.banners:
        line, text = token.start[0], token.string
        name = text.strip("#- ")
        if re.fullmatch(r"# -- [^-\s](.*[^-])?", text):
            continue
        if name not in SECTIONS:
            yield line, f"{name!r} is no section of the list; a sub-banner is `# -- NAME`"
        elif text != banner(name):
            yield line, f"a banner is dashed to column {COLUMNS}: {banner(name)}"
        elif name not in rest:
            yield line, f"{name!r} is there twice, or belongs further up"
        else:
            rest = rest[rest.index(name) + 1 :]


def manual_and_imports_come_first(source: Source) -> Findings:
    """Before the first banner stand the docstring and imports, some of them in a `try` or `if`."""
    manual = ast.get_docstring(source.tree)
    if not manual:
        yield 1, "the manual is missing: the file begins with its docstring"
    for node in source.tree.body[1 if manual else 0 :]:
        parts = ast.walk(node) if isinstance(node, ast.Try | ast.If) else [node]
        imports = any(isinstance(part, ast.Import | ast.ImportFrom) for part in parts)
        if source.section(node.lineno) == -1 and not imports:
            yield node.lineno, "not an import: move it, and what follows, below the first banner"
            return


def names(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """The names that a statement of the file gives to it, and those that it takes from it."""
    tables = [symtable.symtable(ast.unparse(statement), PROGRAM.name, "exec")]
    gives = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_assigned()}
    takes: set[str] = set()
    for table in tables:  # grows
        takes.update(symbol.get_name() for symbol in table.get_symbols() if symbol.is_global())
        tables += table.get_children()
    for node in ast.walk(statement):
        hint = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if hint and "Literal[" not in ast.unparse(hint):  # what it has in quotes is not a name
            takes.update(re.findall(NAME, ast.unparse(hint)))
    return gives, takes


def no_name_comes_from_a_later_section(source: Source) -> Findings:
    """Whoever reads from top to bottom has met every name before."""
    statements = [(node, *names(node)) for node in source.tree.body]
    defined = {name: node.lineno for node, gives, _ in reversed(statements) for name in gives}
    for statement, _, takes in statements:
        for name in takes & defined.keys():
            section = source.section(defined[name])
            if section > source.section(statement.lineno):
                uses = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
                lines = [node.lineno for node in uses if node.id == name]
                line = min(lines, default=statement.lineno)
                text = f"`{name}` comes below, in {source.sections[section][0]!r}"
                yield line, f"{text}, line {defined[name]}: move it up, or have it passed in"


# ---- sizes and layout ----------------------------------------------------------------------------


def above(most: float, line: int, count: float, what: str, advice: str) -> Findings:
    """A finding if there is more of something than there should be."""
    if count > most:
        yield line, f"{count:.4g} {what}, at most {most}: {advice}"


def files_and_sections_are_short(source: Source) -> Findings:
    """Each part can be read in one go."""
    for number, line in enumerate(source.lines, 1):
        yield from above(COLUMNS, number, len(line), "columns", "break the line")
    for name, first, last in source.sections:
        advice = "what belongs elsewhere?"
        yield from above(450, first, last - first + 1, f"lines in {name!r}", advice)


def complexity(function: Function) -> int:
    """The paths through a function, with those in it, as ruff's C901 counts them."""
    total = 0
    for node in ast.walk(function):
        if isinstance(node, Function | Branch):
            total += 1
        if isinstance(node, ast.Try | ast.TryStar) and node.orelse:
            total += 1
        if isinstance(node, ast.Match):
            last = node.cases[-1]
            anything = isinstance(last.pattern, ast.MatchAs) and last.pattern.pattern is None
            total -= int(anything and last.guard is None)
    return total


def functions_and_classes_are_small(source: Source) -> Findings:
    """A function fits on a screen, a class in a head."""
    for node in source.functions:
        line, name = node.lineno, node.name
        yield from above(50, line, size(node), f"lines in `{name}`", "take a step out of it")
        count = complexity(node)
        yield from above(10, line, count, f"paths in `{name}`", "take decisions out of it")
    for owner in source.classes:
        line, name = owner.lineno, owner.name
        advice = "what belongs together and could be one object?"
        yield from above(200, line, size(owner), f"lines in `{name}`", advice)
        for node in methods(owner):
            count = len(parameters(node)) - 1 if node.name == "__init__" else 0
            yield from above(6, node.lineno, count, f"collaborators of `{name}`", advice)


def one_idea_stands_on_a_line(source: Source) -> Findings:
    """Lines that are saved by moving them into columns are not saved."""
    each = []
    for node in source.functions:
        much = source.density(node, node.lineno, node.lineno + size(node) - 1)
        each.append((much, f"`{node.name}` (line {node.lineno}) {much:.1f}"))
    worst = ", ".join(text for _, text in sorted(each, reverse=True)[:5])
    count = source.density(source.tree, 1, len(source.lines))
    yield from above(4.5, 1, count, "expression nodes a code line", f"the densest are {worst}")


def is_table(node: ast.stmt) -> bool:
    """Whether a value is a container or call whose leaves are constants, names and attributes."""
    value = getattr(node, "value", None)
    leaves = ast.Constant | ast.Name | ast.Attribute | ast.UnaryOp
    glue = ast.keyword | ast.Starred | ast.expr_context | ast.USub  # so -1 is a constant
    parts = list(ast.walk(value)) if isinstance(value, Container) else []
    return bool(parts) and all(isinstance(part, Container | leaves | glue) for part in parts)


def only_tables_are_laid_out_by_hand(source: Source) -> Findings:
    """`# fmt: skip` ends a table of literals. `# fmt: off` is not used."""
    statements = [node for node in source.nodes if isinstance(node, ast.stmt)]
    pragmas = [token for token in source.comments if re.search(r"#\s*fmt:", token.string)]
    for token in pragmas:
        line = token.start[0]
        around = [node for node in statements if 0 <= line - node.lineno < size(node)]
        innermost = max(around, key=lambda node: node.lineno, default=ast.Pass())
        if "skip" not in token.string or not is_table(innermost):
            yield line, "only `# fmt: skip` at the end of a table of literals: let it be formatted"


# ---- shapes --------------------------------------------------------------------------------------


def is_lambda(value: ast.expr | None) -> bool:
    """Whether a value is a lambda, or one of two."""
    arms = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
    return any(isinstance(arm, ast.Lambda) for arm in arms)


def repeats(node: ast.AST) -> bool:
    """Whether there is a second node of the same kind in a node."""
    return sum(isinstance(part, type(node)) for part in ast.walk(node)) > 1


def no_riddles_are_used(source: Source) -> Findings:
    """Some shapes save a line and cost the reader a minute."""
    for node in source.nodes:
        match node:
            case ast.Call(func=ast.IfExp()):
                yield node.lineno, "a conditional callee: write both calls in an `if` statement"
            case ast.IfExp() if repeats(node):
                yield node.lineno, "a conditional in a conditional: write `if` statements"
            case ast.Lambda() if repeats(node):
                yield node.lineno, "a lambda in a lambda: write a `def` for one of them"
            case ast.Assign() | ast.AnnAssign() | ast.NamedExpr() if is_lambda(node.value):
                yield node.lineno, "a lambda with a name: write a `def`"
            case ast.Assign(targets=[ast.Tuple() as left, *_], value=ast.Tuple() as right):
                if min(len(left.elts), len(right.elts)) > 2:
                    yield node.lineno, "three assignments in one: give each a line"
            case ast.AugAssign(value=ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not())):
                yield node.lineno, "a truth value is added: write an `if` statement"


def only_parsers_return_any(source: Source) -> Findings:
    """After an Any, mypy sees nothing."""
    parsers = [(first, last) for name, first, last in source.sections if name in PARSERS]
    for node in source.functions:
        kinds = ast.unparse(node.returns).strip("'\"").split(" | ") if node.returns else []
        parser = any(first <= node.lineno <= last for first, last in parsers)
        if {"Any", "typing.Any"} & set(kinds) and not parser:
            yield node.lineno, f"`{node.name}` returns Any: name the type, or use a type variable"


# ---- objects, errors and words -------------------------------------------------------------------


def stored(node: ast.AST) -> list[tuple[int, str, str]]:
    """The attributes that are assigned to: line, object and name."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
    stores = [part for part in parts if isinstance(part.ctx, ast.Store)]
    return [(part.lineno, ast.unparse(part.value), part.attr) for part in stores]


def attributes_are_born_in_init(source: Source) -> Findings:
    """Who has read `__init__` and the class's own fields knows all the state there is."""
    for owner in source.classes:
        fields = [node for node in owner.body if isinstance(node, ast.Assign | ast.AnnAssign)]
        parts = [part for field in fields for part in ast.walk(field)]
        names = [part for part in parts if isinstance(part, ast.Name)]
        born = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        own = [
            (node.name, line, name) for node in methods(owner) for line, item, name in stored(node) if item == "self"
        ]
        born |= {name for method, _, name in own if method == "__init__"}
        for method, line, name in own:
            if name not in born:
                text = f"`{owner.name}.{name}` is born in `{method}`"
                yield line, f"{text}: give it a first value in `__init__`"


def kinds(function: Function, known: dict[str, str]) -> dict[str, str]:
    """What objects a function gets and keeps: their annotations, or what makes them."""
    known = dict(known)
    for part in parameters(function):
        known[part.arg] = ast.unparse(part.annotation) if part.annotation else ""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            value = node.value.func if isinstance(node.value, ast.Call) else node.value
            kind = ast.unparse(getattr(node, "annotation", value) or node)
            if target.startswith("self.") or kind in known:  # not what has just been made here
                known[target] = known.get(kind, kind)
    return known


def objects_are_not_changed_from_outside(source: Source) -> Findings:
    """A parameter or collaborator that is of a class of ours gets no new values for its fields."""
    ours = {owner.name for owner in source.classes}
    for scope in [source.tree.body, *(owner.body for owner in source.classes)]:
        functions = [node for node in scope if isinstance(node, Function)]
        kept: dict[str, str] = {}
        for function in functions:
            said = kinds(function, {}).items()
            kept |= {name: kind for name, kind in said if name.startswith("self.")}
        for function in functions:
            said = kinds(function, kept).items()
            theirs = [name for name, kind in said if ours & set(re.findall(NAME, kind))]
            for line, item, name in stored(function):
                if any(f"{item}.".startswith(f"{their}.") for their in theirs):
                    yield line, f"`{item}.{name}` is set from outside: give its class a method"


def only_errors_and_protocols_have_heirs(source: Source) -> Findings:
    """What two classes share is a function or a collaborator; a library's classes are free."""
    types = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
    errors = {name for name, kind in types.items() if issubclass(kind, BaseException)}
    taken = types.keys() | {owner.name for owner in source.classes}
    for owner in source.classes:
        bases = {ast.unparse(base).partition("[")[0] for base in owner.bases}
        for base in bases & taken - errors:
            text = f"`{owner.name}` inherits from `{base}`"
            yield owner.lineno, f"{text}: take it as a collaborator, or share a function"
        if "Protocol" in bases:
            taken -= {owner.name}
        if bases & errors or any(base.endswith("Error") for base in bases):
            errors.add(owner.name)


def no_exception_is_swallowed_unseen(source: Source) -> Findings:
    """Whoever catches every exception does something about it."""
    for node in source.nodes:
        match node:
            case ast.ExceptHandler():
                kinds = ast.unparse(node.type) if node.type else "BaseException"
                nothing = {ast.unparse(item) for item in node.body} <= {"pass", "continue", "..."}
            case ast.Call(func=function):
                kinds = " ".join(ast.unparse(kind) for kind in node.args)
                nothing = ast.unparse(function).endswith("suppress")
            case _:
                continue
        if nothing and re.search(r"\b(Base)?Exception\b", kinds):
            yield node.lineno, "swallows every exception: name the kinds expected, or log it"


def what_is_public_has_a_docstring(source: Source) -> Findings:
    """Classes, functions and methods with no underscore say what they are.

    What a Protocol of ours promises is said there, and what a parser takes by its decorator.
    """
    protocols = [owner for owner in source.classes if "Protocol" in map(ast.unparse, owner.bases)]
    promised = {method.name for owner in protocols for method in methods(owner)}
    for body in [source.tree.body, *(owner.body for owner in source.classes)]:
        for node in body:
            if isinstance(node, Function | ast.ClassDef) and ast.get_docstring(node) is None:
                decorators = " ".join(ast.unparse(item) for item in node.decorator_list)
                said = node.name in promised and node.col_offset > 0
                said = said or re.search(r"overload|expects\(", decorators) is not None
                if not node.name.startswith("_") and not said:
                    yield node.lineno, f"`{node.name}` has no docstring: say what it is"


def comments_stand_alone(source: Source) -> Findings:
    """They don't tell how the file came to be or what is to do. Code in backticks and URLs may."""
    for token in source.comments:
        text = re.sub(r"`[^`]*`|https?://\S+", "", token.string)
        if word := re.search(r"\b((?i:sessions?|issues?)|TODO|FIXME|XXX)\b", text):
            yield token.start[0], f"the word {word[0]!r}: give the reason itself, or do it now"


# ---- the rules with examples: a source that breaks the rule, and the line where it does ----------

Rule = Callable[[Source], Findings]
RULES: dict[Rule, dict[str, int]] = {
    banners_stand_in_the_order_of_reading: {
        "# --- Rules ---": 1,
        f"x = 1\n{banner('Rulers')}": 2,
        f"{banner('Rules')}\n{banner('Values')}": 2,
        f"{banner('Rules')}\n{banner('Rules')}": 2,
        "# -- lanes ---": 1,
    },
    manual_and_imports_come_first: {
        "import os": 1,
        f"'''Manual.'''\nimport os\nx = 1\n{banner('Rules')}\ny = 2": 3,
    },
    no_name_comes_from_a_later_section: {
        f"{banner('Rules')}\n{use}\n{banner('Routes')}\ndef x(): ...\nclass X: ...": 2
        for use in (
            "def f(): return [x() for y in z]",
            "async def f(y=x): ...",
            "class A(X): ...",
            "class A: y: list['X']",
            "def f(y: X | None): ...",
            "def f() -> 'X': ...",
        )
    },
    files_and_sections_are_short: {
        f"x = 1\ny = '{'x' * 95}'": 2,
        banner("Rules") + "\n" * 450 + "x = 1": 1,
        banner("SQLite work") + ("\n" * 200 + "# -- part") * 3 + "\nx = 1": 1,
    },
    functions_and_classes_are_small: {
        "def f():" + "\n    x" * 50: 1,
        "def f():" + "\n    if x: pass" * 10: 1,
        "def f():\n    try: x\n    except A: x\n    else: x" + "\n    if x: pass" * 8: 1,
        "class A:" + "\n    x = 1" * 200: 1,
        "class A:\n    def __init__(self, a, b, c, /, d, *e, f, **g): ...": 2,
    },
    one_idea_stands_on_a_line: {"def f(): return a + b + c": 1},
    only_tables_are_laid_out_by_hand: {
        "x = [1, -2, a.b, f(c, d=(3,))]  # fmt: skip\ny = [1 + 2]  # fmt: skip": 2,
        "def f(): # fmt: skip\n    return 1": 1,
        "x = 1\n# fmt: off": 2,
    },
    no_riddles_are_used: {
        "(f if x else g)(1)": 1,
        "f = lambda: 1": 1,
        "class A:\n    clock: Clock = lambda: 1": 2,
        "f = (lambda: 1) if x else g": 1,
        "sort(key=lambda x: lambda y: x)": 1,
        "a, b = x, y\na, b, c = x, y, z": 2,
        "x = a if b else f(c if d else e)": 1,
        "x |= a < b": 1,
        "x += a and b": 1,
        "x += not a": 1,
    },
    only_parsers_return_any: {
        f"{banner('Values')}\ndef f() -> Any: ...\n{banner('Rules')}\ndef g() -> Any: ...": 4,
        "def f() -> Any | None: ...": 1,
    },
    attributes_are_born_in_init: {
        "class A:\n  def __init__(self): self.x = 1\n  def f(self): self.x = 2\n  def g(self): self.y = 2": 4,
        "class A:\n  x: int\n  def f(self): self.x = 1\n  def g(self): self.y += 2": 4,
    },
    objects_are_not_changed_from_outside: {
        "class A: ...\ndef f(a: 'A | None', b: B):\n    b.x = 1\n    a.x = 1": 4,
        "class A:\n  def __init__(self, a: A): self.a = a\n  def f(self):\n"
        "    b = self.a.b\n    c = self.a\n    c.x = 1": 6,
        "class A:\n  def __init__(self): self.a = A()\n  def f(self): self.a.b.x = 1": 3,
    },
    only_errors_and_protocols_have_heirs: {
        "class A: ...\nclass B(A): ...": 2,
        "class A(dict): ...": 1,
        "class A(Protocol): ...\nclass B(A): ...\nclass C(B): ...": 3,
    },
    no_exception_is_swallowed_unseen: {
        "try: x\nexcept A: pass\nexcept Exception: pass": 3,
        "for x in y:\n    try: x\n    except: continue": 3,
        "try: x\nexcept (A, BaseException): ...": 2,
        "with suppress(A): x\nwith contextlib.suppress(Exception): x": 2,
    },
    what_is_public_has_a_docstring: {
        "class A:\n    'It.'\n    def _f(self): ...\n    def f(self): ...": 4,
        "class A: ...": 1,
        "async def f(): ...": 1,
    },
    comments_stand_alone: {
        "# `issue`, ClientSession, https://x.y/issues/1\n# as the last Session said": 2,
        "x = 1  # see issue 12": 1,
        "x = 1  # TODO": 1,
    },
}

# What looks like a breach and is none.
HOUSE = f"""'''The manual.'''
try:
    import y
except ImportError:
    y = None
{banner("Errors")}
class Mine(Exception):
    '''An error.'''
class Special(Mine):
    '''Another.'''
{banner("Rules")}
# -- first
class Seam(Protocol):
    '''A protocol.'''
class Thing(Seam, y.Base):
    '''Has a name that is a local one elsewhere.'''
    state: Literal["later"] = "later"
    def __init__(self, later: int) -> None:
        self.later = later
    def change(self, other: y.Base) -> None:
        '''Use what is its own or a library's.'''
        self.later += 1
        self.state = "later"
        other.y = [later for later in self.later]
        with suppress(KeyError):
            thing = Thing(1)
            thing.x = 1
{banner("Daemon")}
later = 1
"""


def report(path: Path) -> list[str]:
    """Every finding of every rule, by line."""
    try:
        source = Source(path.read_text("utf-8"))
    except SyntaxError as error:
        return [f"{path}:{error.lineno}: {error.msg}"]
    findings = sorted({(*finding, rule.__name__) for rule in RULES for finding in rule(source)})
    return [f"{path}:{line}: {name.replace('_', ' ')}: {text}" for line, text, name in findings]


# ---- tests ---------------------------------------------------------------------------------------

pytestmark = pytest.mark.no_cover  # nothing of the program runs here


@pytest.fixture(scope="module")
def program() -> Source:
    """The program, taken apart once."""
    return Source(PROGRAM.read_text("utf-8"))


@pytest.mark.parametrize("rule", RULES)
def test_the_daemon_keeps_the_rules_of_the_house(rule: Rule, program: Source) -> None:
    """Each finding has its line and what to do."""
    findings = rule(program)
    lines = [f"{PROGRAM.name}:{line}: {text}" for line, text in findings]
    assert lines == [], "\n".join(lines)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_sees_what_it_forbids(rule: Rule) -> None:
    """In each of its examples a rule finds the one line that is wrong."""
    seen = {text: [line for line, _ in rule(Source(text))] for text in RULES[rule]}
    assert seen == {text: [line] for text, line in RULES[rule].items()}


@pytest.mark.parametrize(("text", "count"), [(HOUSE, 0), (HOUSE + "# TODO\n", 1), ("x =", 1)])
def test_the_rules_can_be_asked_while_the_file_is_written(text: str, count: int, tmp_path: Path) -> None:
    """As a script, this file prints a line for each finding, and exits 1 if there is one."""
    path = tmp_path / "draft.py"
    path.write_text(text, "utf-8")
    command = [sys.executable, __file__, str(path)]
    script = subprocess.run(command, capture_output=True, text=True, check=False)
    assert script.stderr == ""
    assert script.stdout.count("draft.py:") == count, script.stdout
    assert script.returncode == min(count, 1)


def test_a_file_beyond_the_tripwire_has_a_list_of_what_could_go() -> None:
    """Crossing 5,500 lines needs it in writing."""
    long = PROGRAM.read_text("utf-8").count("\n") > 5500
    assert not long or "\n## What could go\n" in CONTRIBUTING.read_text("utf-8")


def test_the_map_has_all_sections_in_their_order(program: Source) -> None:
    """What a newcomer reads first says where everything is."""
    sections = [name for name, _, _ in program.sections]
    parts = CONTRIBUTING.read_text("utf-8").partition("\n## ")[0]
    assert re.findall(r"\*\*(.+?)\*\*", parts) == sections


def test_there_is_no_second_module_and_no_package() -> None:
    """Copying one file is enough to have all of the daemon."""
    modules = [*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py")]
    assert modules == [PROGRAM]


def test_the_version_is_the_same_everywhere() -> None:
    """What is installed and what the program says of itself agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    program = PROGRAM.read_text("utf-8")
    assert f'\nVERSION = "{project["version"]}"\n' in program
    (released,) = re.findall(r'^RELEASED = "(.*)"$', program, re.MULTILINE)
    assert f"\n## {project['version']} ({released})\n" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_test_that_the_readme_names_is_there() -> None:
    """The page on what the daemon survives can be looked up."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text("utf-8")))
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert named
    assert named - set(re.findall(r"def (test_\w+)", tests)) == set()


if __name__ == "__main__":
    breaches = report(Path(sys.argv[1]))
    print("\n".join(breaches))
    sys.exit(bool(breaches))
