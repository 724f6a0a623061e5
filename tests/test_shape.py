"""The file is read as a lesson: its order, its sizes, its names and what it needs are kept by tests."""

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest

import rlhf_constructor as rc
from tests.tiny import ROOT

SCRIPT = ROOT / "rlhf_constructor.py"
SOURCE = SCRIPT.read_text("utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
FUNCTIONS = {
    f"{node.name}, line {node.lineno}": node.end_lineno - node.lineno + 1
    for node in ast.walk(TREE)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
}


def test_sections_stand_in_the_order_of_the_docstrings_map():
    banners = re.findall(r"^# (§\d+) +([A-Z ]+?):", SOURCE, re.M)
    promised = re.findall(r"^    (§\d+) +([A-Z]+(?: [A-Z]+)*)  ", rc.__doc__, re.M)
    assert banners == promised and len(banners) >= 9


def test_a_banner_names_only_what_its_section_holds():
    sections = re.split(r"^(?=# §\d+ )", SOURCE, flags=re.M)[1:]
    for section in sections:
        banner, _, body = section.partition("\n")
        names = re.findall(r"\b[a-z]+(?:_[a-z]+)+\b|\b[A-Z]+_[A-Z]+\b", banner)
        assert not [name for name in names if not re.search(rf"\b{name}\b", body)], banner


TABLES = {"INPUTS": rc.INPUTS, "METHODS": rc.METHODS, "FILTERS": rc.FILTERS, "OUTPUTS": rc.OUTPUTS,
          "PROVIDERS": rc.PROVIDERS, "STRATEGIES": rc.STRATEGIES}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_every_entry_of_every_table_explains_itself_in_help(table):
    shown = " ".join(rc.build_parser().format_help().split())
    for name, entry in TABLES[table].items():
        first = " ".join(rc.first_line(entry).split())
        assert len(first) > 10 and f" {name} {first} " in f"{shown} ", name


def test_the_header_and_requirements_txt_name_the_same_packages():
    header = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.M | re.S)[1]
    meta = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.M))
    assert meta["dependencies"] == (ROOT / "requirements.txt").read_text().split()
    assert meta["requires-python"] == ">=3.11"


BLOCK = "import sys; sys.modules.update(dict.fromkeys(['openai', 'dashscope', 'aiohttp', 'httpx', 'tqdm'])); "


def bare(code: str, *flags) -> subprocess.CompletedProcess:
    """Run code in a Python without site-packages, in which the SDKs cannot be imported."""
    return subprocess.run([sys.executable, "-S", "-c", BLOCK + code, *flags], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})  # fmt: skip


def test_importing_the_script_needs_the_standard_library_only():
    assert bare("import rlhf_constructor").returncode == 0


def test_help_needs_the_standard_library_only_and_names_every_flag():
    done = bare("import rlhf_constructor as rc; sys.exit(rc.main(['--help']))")
    assert done.returncode == 0 and done.stderr == ""
    flags = {
        name
        for action in rc.build_parser()._actions
        for name in action.option_strings
        if name != "-h"
    }
    assert flags <= set(re.findall(r"--[a-z-]+", done.stdout))


def test_the_offline_provider_needs_the_standard_library_only(tmp_path):
    command = "import rlhf_constructor as rc; sys.exit(rc.main(sys.argv[1:]))"
    data, out = str(ROOT / "data" / "alpaca_demo.jsonl"), str(tmp_path / "out.jsonl")
    done = bare(command, "--provider", "offline", "--input-file", data, "--output-path", out)
    assert done.returncode == 0 and os.path.getsize(out), done.stderr


def test_functions_have_a_ceiling():
    long = {
        name: size
        for name, size in FUNCTIONS.items()
        if size > 60 and not name.startswith("build_parser")
    }
    assert long == {}


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DEFINITIONS = [
    node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


def where(nodes) -> list[str]:
    """The first line of each node, with its number."""
    return [f"{node.lineno}: {LINES[node.lineno - 1].strip()}" for node in nodes]


def test_no_line_is_longer_than_100():
    assert [n for n, line in enumerate(LINES, 1) if len(line) > 100] == []


def is_plain_product(comprehension) -> bool:
    """`for a in x for b in y` without conditions, where y has nothing to do with a."""
    bound = set()
    for generator in comprehension.generators:
        used = {node.id for node in ast.walk(generator.iter) if isinstance(node, ast.Name)}
        if generator.ifs or used & bound:
            return False
        bound |= {node.id for node in ast.walk(generator.target) if isinstance(node, ast.Name)}
    return True


def test_no_comprehension_has_two_fors_unless_it_is_a_plain_product():
    found = [node for node in ast.walk(TREE) if isinstance(node, COMPREHENSIONS)]
    assert where(n for n in found if len(n.generators) > 1 and not is_plain_product(n)) == []


def test_no_comprehension_stands_inside_another():
    nested = []
    for outer in ast.walk(TREE):
        if isinstance(outer, COMPREHENSIONS):
            inner = [node for node in ast.walk(outer) if isinstance(node, COMPREHENSIONS)]
            nested += [outer] if len(inner) > 1 else []
    assert where(nested) == []


def test_no_lambda_has_a_name():
    assigned = [node for node in ast.walk(TREE) if isinstance(node, ast.Assign)]
    assert where(node for node in assigned if isinstance(node.value, ast.Lambda)) == []


def top_level_names() -> set[str]:
    """Functions, classes and modules of the file."""
    names = set()
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def local_names(function) -> list[tuple[str, int]]:
    """(name, line) of arguments and variables of a function."""
    names = []
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names.append((node.arg, node.lineno))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.id, node.lineno))
    return names


def test_no_local_name_hides_a_function_class_or_module_of_the_file():
    top = top_level_names()
    hidden = set()
    for function in DEFINITIONS:
        hidden |= {(line, name) for name, line in local_names(function) if name in top}
    assert sorted(hidden) == []


def test_every_function_is_annotated():
    bare = []
    for function in DEFINITIONS:
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        named = [one for one in arguments if one and one.arg not in ("self", "cls")]
        if not function.returns or not all(one.annotation for one in named):
            bare.append(function)
    assert where(bare) == []


def test_a_line_holds_nine_syntax_nodes_at_most_on_average():
    """Of all lines but blank ones and comments; pycodestyle has 6.0, bottle 6.6. The pages are texts."""
    pages = next(n for n, line in enumerate(LINES, 1) if re.match(r"# §\d+ +PAGES", line))
    nodes = 0
    for statement in TREE.body:
        if statement.lineno < pages:
            nodes += sum(1 for _ in ast.walk(statement))
    lines = [line for line in LINES[:pages] if re.match(r" *[^ #]", line)]
    assert nodes / len(lines) <= 9


def test_every_flag_that_the_script_names_exists():
    known = {name for action in rc.build_parser()._actions for name in action.option_strings}
    styles = {
        name for names in re.findall(r"(--[a-z-]+) *:|var\((--[a-z-]+)", SOURCE) for name in names
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", SOURCE))
    assert sorted(named - known - styles) == []


def test_the_word_edit_marks_the_places_to_edit_and_nothing_else():
    places = [line for line in LINES if "EDIT" in line]
    assert len(places) >= 5 and all(re.match(r"# EDIT HERE ", line) for line in places)


def test_names_are_looked_up_in_tables_and_nowhere_written_twice():
    """argparse's choices come from the tables, so that an entry of one's own is known at once."""
    choices = {a.dest: a.choices for a in rc.build_parser()._actions if a.choices}
    assert choices["method"] == list(rc.METHODS) and choices["output_format"] == list(rc.OUTPUTS)
    assert choices["strategy"] == list(rc.STRATEGIES)
    assert choices["provider"] == [name for name in rc.PROVIDERS if name != "reward"]


def test_the_script_runs_everywhere_as_utf_8():
    assert not re.search(r"\bos\.(fork|getuid|chmod|kill|symlink)\b", SOURCE)
    for call in re.findall(r"\.(?:read_text|write_text)\([^)]*\)", SOURCE):
        assert "utf-8" in call, call


def test_no_name_of_the_module_is_given_twice():
    """a constant of one section that takes another's name changes what that one does"""
    given = [name for node in TREE.body for name in names_bound(node)]
    assert sorted(given) == sorted(set(given))


def names_bound(node) -> list[str]:
    """The names that a statement of the module binds anew."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name) and
            isinstance(part.ctx, ast.Store)]  # fmt: skip
