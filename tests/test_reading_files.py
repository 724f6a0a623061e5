"""Files of every kind: known by their first bytes, read row by row, or refused with what to do."""

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
import sys
import zipfile

import pytest

import rlhf_constructor as rc
from tests.tiny import run_of

JSONL = b'{"prompt": "a"}\n{"prompt": "b"}\n'
CSV = b"prompt,output\na,x\nb,y\n"
BOTH = ["a", "b"]


def prompts(path, content, name) -> list:
    """Write a file, read it: its prompts, or the reasons of what could not be read."""
    file = path / name
    file.write_bytes(content)
    records = [record for _, record in rc.read_records(str(file))]
    return [r.prompt if isinstance(r, rc.Record) else r.reason for r in records]


def parquet(*rows, **more) -> bytes:
    """The bytes of a Parquet file with these rows."""
    pyarrow = pytest.importorskip("pyarrow", reason="no pyarrow here")
    parquet_files = pytest.importorskip("pyarrow.parquet")
    target = io.BytesIO()
    parquet_files.write_table(pyarrow.Table.from_pylist(list(rows)), target, **more)
    return target.getvalue()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
@pytest.mark.parametrize("end", ["", ".gz", ".bz2", ".xz", ".zst", ".GZ"])
def test_compression_is_told_by_the_first_bytes_whatever_the_name(tmp_path, pack, end):
    assert prompts(tmp_path, pack(JSONL), "in.jsonl" + end) == BOTH
    assert prompts(tmp_path, pack(CSV), "in.csv" + end) == BOTH


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_truncated_compressed_file_is_one_clear_error(tmp_path, pack):
    with pytest.raises(rc.UserError, match=r"in.jsonl: cannot be read \(.*\)$"):
        prompts(tmp_path, pack(JSONL * 999)[:-20], "in.jsonl")


def test_zstd_says_how_to_unpack_it(tmp_path):
    with pytest.raises(rc.UserError, match="compressed with zstd: unpack it first, zstd -d FILE"):
        prompts(tmp_path, b"\x28\xb5\x2f\xfd rest", "in.jsonl.zst")


def zip_file() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("xl/workbook.xml", "x")
    return target.getvalue()


OTHER_KINDS = [
    pytest.param(zip_file(), "Excel, Word or zip.*CSV UTF-8, or unpack it", id="xlsx, zip"),
    pytest.param(b"\xff\xff\xff\xff\x00", "an Arrow file: save it as JSONL", id="Arrow"),
    pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="Git LFS"),
    pytest.param(b"<!doctype html><html>", "a web page", id="a web page"),
    pytest.param(b"PAR1 not really PAR1", "cannot be read", id="damaged Parquet"),
]  # fmt: skip


@pytest.mark.parametrize("content, message", OTHER_KINDS)
@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_another_kind_of_file_says_what_it_is_and_what_to_do(tmp_path, content, message, name):
    if b"PAR1" in content:
        pytest.importorskip("pyarrow")
    with pytest.raises(rc.UserError, match=f"{name}: .*{message}") as error:
        prompts(tmp_path, content, name)
    assert "\n" not in str(error.value)


# --- Parquet

NESTED = {
    "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}],
    "n": 1,
}


@pytest.mark.parametrize("name", ["in.parquet", "in.jsonl", "in"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_parquet_is_read_whatever_its_name(tmp_path, name, pack):
    assert prompts(tmp_path, pack(parquet({"prompt": "a"}, {"prompt": "b"})), name) == BOTH


def test_lists_and_structs_of_parquet_are_lists_and_objects(tmp_path):
    answers = [{"response": "x", "score": 2.0}, {"response": "y", "score": 1.0}]
    (tmp_path / "in").write_bytes(parquet(NESTED | {"completions": answers}))
    [(line, row)] = rc.read_rows(str(tmp_path / "in"))
    assert line == 1 and row == NESTED | {"completions": answers}


def test_row_groups_are_read_one_after_the_other_and_rows_are_numbered(tmp_path):
    rows = [{"prompt": f"q{i}"} for i in range(2500)]
    (tmp_path / "in").write_bytes(parquet(*rows, row_group_size=700))
    found = list(rc.read_rows(str(tmp_path / "in")))
    assert found == list(enumerate(rows, 1))


def test_values_of_parquet_are_those_of_json(tmp_path):
    row = {"day": datetime.date(2024, 5, 1), "at": datetime.datetime(2024, 5, 1, 12, 30), "nan": float("nan"),
           "price": decimal.Decimal("7.50"), "raw": "é".encode(), "bytes": b"\xff", "none": None, "yes": True, "n": 7}  # fmt: skip
    (tmp_path / "in").write_bytes(parquet(row))
    [(_, found)] = rc.read_rows(str(tmp_path / "in"))
    assert rc.is_missing(found.pop("nan"))
    assert found == {"day": "2024-05-01", "at": "2024-05-01 12:30:00", "price": "7.50", "raw": "é",
                     "bytes": "\ufffd", "none": None, "yes": True, "n": 7}  # fmt: skip


def test_missing_cells_of_parquet_are_missing(tmp_path):
    rows = [{"instruction": "a", "input": None}, {"instruction": "b", "input": "more"}]
    assert prompts(tmp_path, parquet(*rows), "in.parquet") == ["a", "b\n\nmore"]
    picture = {"prompt": "a", "image": {"bytes": b"\xff", "path": None}}
    assert prompts(tmp_path, parquet(picture), "in.parquet") == ["not a text: images"]


def test_without_pyarrow_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(rc.UserError, match="in.parquet: .*pip install pyarrow$"):
        prompts(tmp_path, b"PAR1", "in.parquet")


# --- tables and lines

TABLES = [
    pytest.param("in.csv", "sep=;\nprompt;output\na;x\nb;y\n", id="Excel's sep= line"),
    pytest.param("in.csv", "\ufeffsep=\t\r\nprompt\toutput\r\na\tx\r\nb\ty\r\n", id="sep= a tab, with BOM"),
    pytest.param("in.csv", "prompt\toutput\na\tx\nb\ty\n", id="a .csv with tabs"),
    pytest.param("in.csv", "Prompt, Output\na,x\nb,y\n", id="a header in other case"),
    pytest.param("in.CSV", "prompt,output\na,x\nb,y\n", id="an ending in capitals"),
]  # fmt: skip


@pytest.mark.parametrize("name, content", TABLES)
def test_a_table_is_read_as_excel_and_people_write_it(tmp_path, name, content):
    assert prompts(tmp_path, content.encode(), name) == BOTH


def test_lines_are_counted_from_the_files_start_after_a_sep_line(tmp_path):
    (tmp_path / "in.csv").write_text("sep=;\nprompt;n\na;1\nb;1;2\n", "utf-8")
    assert [line for line, _ in rc.read_rows(str(tmp_path / "in.csv"))] == [3, 4]


def test_a_tsv_whose_quotes_do_not_balance_is_read_without_quoting(tmp_path):
    table = 'prompt\toutput\n"Hi" he said\tx\n5" of rain\ty\n"open\tz\n'
    found = prompts(tmp_path, table.encode(), "in.tsv")
    assert found == ['"Hi" he said', '5" of rain', '"open']


def test_a_tsv_with_quoted_cells_is_read_with_quoting(tmp_path):
    table = 'prompt\toutput\n"two\nlines"\tx\n"a ""b"""\ty\n'
    assert prompts(tmp_path, table.encode(), "in.tsv") == ["two\nlines", 'a "b"']
    broken = 'prompt\toutput\n"a ""b"""\tx\n"open"!\ty\nc\tz\n'
    a, failed, c = prompts(tmp_path, broken.encode(), "in.tsv")
    assert (a, c) == ('a "b"', "c") and "check the quotes of lines 3 to 3" in failed


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]


def test_lines_that_are_lists_of_turns_are_conversations(tmp_path):
    line = json.dumps(TURNS)
    assert prompts(tmp_path, f"{line}\n{line}\n".encode(), "in.jsonl") == ["a", "a"]
    assert prompts(tmp_path, line.encode(), "in.json") == ["a"]
    assert prompts(tmp_path, f"[{line}, {line}]".encode(), "in.json") == ["a", "a"]


def test_other_lines_that_are_lists_are_named_as_such(tmp_path):
    found = prompts(tmp_path, b'["a", "b"]\n{"prompt": "a"}\n', "in.jsonl")
    assert found == ["not a record: a list instead of an object", "a"]


# --- what a run says of its input at the start


def checked(path, content, *flags):
    """What check_input makes of a file."""
    (path / "in.jsonl").write_bytes(content)
    rc.check_input(str(path / "in.jsonl"), run_of("--input-file", str(path / "in.jsonl"), *flags))


def test_one_note_names_the_fields_that_nothing_reads(tmp_path, capsys):
    row = {"id": 7, "prompt": "Q", "output": "x", "passages": ["p"], "source": "web"}
    checked(tmp_path, json.dumps(row).encode() * 1)
    assert capsys.readouterr().err.count("fields not used: passages, source; --rename OLD=NEW") == 1
    checked(tmp_path, b'{"id": 7, "prompt": "Q", "output": "x", "label": true}')
    assert capsys.readouterr().err == ""


def test_a_rename_makes_use_of_a_field(tmp_path, capsys):
    row = {"prompt": "Q", "output": "x", "facts": "p"}
    checked(tmp_path, json.dumps(row).encode(), "--rename", "facts=context")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("row", [b'{"foo": 1}', b'{"prompt": "Q", "history": "x"}', b"[1]\n[2]"])
def test_an_unknown_shape_is_refused_with_the_shapes_there_are(tmp_path, row):
    with pytest.raises(rc.UserError, match="in.jsonl:1: .*Accepted: `messages`.*--rename OLD=NEW"):
        checked(tmp_path, row)


def test_answers_that_may_be_bad_are_no_references_offline(tmp_path):
    with pytest.raises(rc.UserError, match="no record has an answer.*label or a score"):
        checked(tmp_path, b'{"prompt": "Q", "completion": "x", "label": false}')


# --- Parquet and CSV that break


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_arrays([arrow.array(["a"])] * 2, names=["prompt", "prompt"])
    arrow.parquet.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(rc.UserError, match="stands twice"):
        list(rc.read_rows(str(tmp_path / "in.parquet")))


@pytest.mark.parametrize(
    ("kind", "value"),
    [("timestamp('ns')", 1001), ("timestamp('s')", 10**14), ("duration('s')", 2**62)],
)
def test_a_time_that_python_cannot_hold_costs_no_row(tmp_path, kind, value):
    arrow = pytest.importorskip("pyarrow")
    times = arrow.array([value], eval(f"arrow.{kind}"))
    table = arrow.table({"prompt": ["a"], "when": times})
    arrow.parquet.write_table(table, tmp_path / "in.parquet")
    [(_, row)] = rc.read_rows(str(tmp_path / "in.parquet"))
    assert row["prompt"] == "a"
