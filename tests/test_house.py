"""The two storeys: the paper's files stand by themselves, data above them, engine above both; and none grows large."""

import ast
import io
import sys
import tokenize

import pytest
from scripts import ROOT

PACKAGE = sorted((ROOT / "msad").rglob("*.py"))
PAPER = [path for path in PACKAGE if path.parent.name == "msad" and path.stem != "__init__"]
SCRIPTS = [ROOT / f"{name}.py" for name in ("train", "distill", "evaluate")]
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def imported(path):
    """The modules that a file imports, as absolute names: of `from a import b` it is a.b, module or not."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            yield from (".".join([*base, *filter(None, [node.module]), name.name]) for name in node.names)


def code_lines(path):
    """How many lines hold code: neither blank, nor comment, nor docstring."""
    source, docstrings = path.read_text(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for t in tokens if t.type not in NO_CODE for line in range(t.start[0], t.end[0] + 1)}
    return len(code - docstrings)


def test_the_paper_s_files_import_each_other_and_the_usual_libraries_alone():
    libraries = {"torch", "torchvision", "PIL", "numpy", *sys.stdlib_module_names}
    assert len(PAPER) == 10
    for path in PAPER:
        for name in imported(path):
            top, *rest = name.split(".")
            assert top in libraries or top == "msad" and rest[0] in {other.stem for other in PAPER}, (path, name)


def test_data_imports_nothing_of_the_engine():
    names = [name for path in PACKAGE if path.parent.name == "data" for name in imported(path)]
    assert "msad.data.errors.InputError" in names and "msad.images.resize" in names
    assert not any(name.startswith("msad.engine") for name in names)


def test_the_paper_fits_into_700_lines_of_code():
    assert sum(map(code_lines, PAPER)) <= 700


@pytest.mark.parametrize("path", PACKAGE + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_300_lines_at_most_and_imports_at_its_top(path):
    source = path.read_text()
    assert source.count("\n") <= 300
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    inside = [n for function in functions for n in ast.walk(function) if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not inside
