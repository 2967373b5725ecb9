"""Rules of the source tree that readers rely on: short files and functions, plain docstrings, unique file names.

A function may have more than 80 body lines if the line above it (above its decorators, if it has any) gives the reason
as `# long: <reason>`.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

import gdino_hf

PACKAGE = Path(gdino_hf.__file__).resolve().parent
REPOSITORY = Path(__file__).resolve().parents[1]
MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_FUNCTION = 80
MOST_LINES_OF_THE_MODEL_FORWARD = 40

# An installed package also holds a copy of demo/, as _demo.
SOURCES = sorted(file for file in PACKAGE.rglob("*.py") if "_demo" not in file.parts)
MODEL_FILES = [file for file in SOURCES if file.parent.name == "model"]
# Folders of the repository outside the package whose prose follows the same rules.
PROSE = SOURCES + sorted(
    file
    for folder in ("conversion", "demo", "examples", "kernels", "tests")
    for file in (REPOSITORY / folder).rglob("*.py")
    if "build" not in file.parts
)

# A paragraph or an argument's text that begins with "Of", and a docstring without a content of its own.
HARD_TO_READ = re.compile(r"Of\s|The same\.")
ARGUMENT = re.compile(r"\s+[\w*`][\w*`, .]*(?: \([^)]*\))?: +(?P<text>\S.*)")
SECTION = re.compile(r"\s*(Args|Attributes|Returns|Yields|Raises|References):\s*")
BANNER = re.compile(r"\s*#+\s*[-=*#~_]{3,}")
# transformers takes such lines for imports when it collects the files of a model to upload.
LOOKS_LIKE_AN_IMPORT = re.compile(r"^\s*(?:import\s+\.\S+\s*$|from\s+\.\S+\s+import)", re.MULTILINE)


def name(file):
    """Return a file's path as the test ids and messages show it."""
    root = PACKAGE if PACKAGE in file.parents else REPOSITORY
    return str(file.relative_to(root))


@functools.cache
def tree(file):
    """Return the syntax tree of a file."""
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def functions(file):
    """Yield the functions and methods of a file."""
    return (node for node in ast.walk(tree(file)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def docstrings(file):
    """Yield line number and text of each docstring, including those below attributes and constants."""
    for node in ast.walk(tree(file)):
        for statement in getattr(node, "body", None) or () if not isinstance(node, (ast.Lambda, ast.IfExp)) else ():
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.value


def body_lines(function):
    """Return the number of lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def gives_a_reason(file, function):
    """Return whether the line above a function explains why it is long."""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    above = file.read_text(encoding="utf-8").splitlines()[first - 2].strip() if first > 1 else ""
    return above.startswith("# long: ") and len(above) > len("# long: ")


def sentences(docstring):
    """Yield the texts in a docstring that begin something: its paragraphs, its arguments and its sections."""
    begins = True
    for line in docstring.splitlines():
        argument = ARGUMENT.fullmatch(line)
        if argument:
            yield argument["text"]
        elif begins and line.strip():
            yield line.strip()
        begins = not line.strip() or SECTION.fullmatch(line) is not None


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_files_are_short(file):
    count = len(file.read_text(encoding="utf-8").splitlines())
    assert count <= MOST_LINES_OF_A_FILE, f"{name(file)} has {count} lines; split it by idea."


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_functions_are_short_or_say_why_not(file):
    long = {
        f"{name(file)}:{function.lineno} {function.name}": body_lines(function)
        for function in functions(file)
        if body_lines(function) > MOST_LINES_OF_A_FUNCTION and not gives_a_reason(file, function)
    }
    assert not long, "Split these functions, or write `# long: <reason>` above them."


def test_the_models_forward_is_short():
    (forward,) = (
        node
        for statement in tree(PACKAGE / "model" / "modeling_gdino.py").body
        if isinstance(statement, ast.ClassDef) and statement.name == "GDinoModel"
        for node in statement.body
        if isinstance(node, ast.FunctionDef) and node.name == "forward"
    )
    assert body_lines(forward) <= MOST_LINES_OF_THE_MODEL_FORWARD


@pytest.mark.parametrize("file", PROSE, ids=name)
def test_docstrings_begin_plainly(file):
    """No paragraph and no argument's text begins with "Of", and none is just "The same."."""
    found = [
        f"{name(file)}:{line}: {text}"
        for line, docstring in docstrings(file)
        for text in sentences(docstring)
        if HARD_TO_READ.match(text)
    ]
    assert found == []


@pytest.mark.parametrize("file", SOURCES, ids=name)
def test_there_are_no_banner_comments(file):
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    assert [f"{name(file)}:{number}" for number, line in lines if BANNER.match(line)] == []


@pytest.mark.parametrize("file", MODEL_FILES, ids=name)
def test_docstrings_of_the_model_hold_no_line_like_a_relative_import(file):
    found = [f"{name(file)}:{line}" for line, text in docstrings(file) if LOOKS_LIKE_AN_IMPORT.search(text)]
    assert found == []


def test_no_file_name_stands_in_two_folders():
    folders = {}
    for file in SOURCES:
        if file.name not in ("__init__.py", "__main__.py"):
            folders.setdefault(file.name, []).append(file.parent.name)
    assert {file: places for file, places in folders.items() if len(places) > 1} == {}


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Of the box.", ["Of the box."]),
        (
            "Return it.\n\n    Args:\n        seed: Of all.\n\n    Returns:\n        Of two.\n    ",
            ["Of all.", "Of two."],
        ),
        ("The same.", ["The same."]),
        ("One of them.\n    Of course a line may continue so.", []),
    ],
)
def test_the_rule_for_docstrings_finds_what_it_should(docstring, expected):
    assert [text for text in sentences(docstring) if HARD_TO_READ.match(text)] == expected


def test_the_rule_for_functions_counts_the_body_and_reads_the_reason(tmp_path):
    file = tmp_path / "long.py"
    body = "".join(f"    x = {number}\n" for number in range(81))
    file.write_text(f'def f():\n    """Doc\n\n    string."""\n{body}\n\n# long: one table\n@cache\ndef g():\n{body}')
    plain, explained = functions(file)
    assert body_lines(plain) == body_lines(explained) == 81
    assert not gives_a_reason(file, plain)
    assert gives_a_reason(file, explained)
