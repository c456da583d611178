"""Tables as spreadsheets and programs write them come back as they were written, or are refused with the line."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opensora.dataset.tables import Record, read_lines, read_table
from opensora.errors import ConfigError

ROWS = [("a.mp4", "a box"), ("b.mp4", 'a box, "moving"; left'), ("c/d.mp4", "two\nlines\tand more")]


def read(text: str | bytes, name: str = "captions.csv") -> list[tuple[str, str]]:
    return [(record.path, record.text) for record in read_table(text if isinstance(text, bytes) else text.encode(), name).records]


def refusal(text: str | bytes, name: str = "captions.csv") -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, name)
    return str(caught.value)


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text(
    st.sampled_from(" ,;\t\"'\n\r\\=ab\u2028\x85\x0b.mp4"), max_size=9
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=4),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.booleans(),
)
@example([(" a.mp4", '", "'), ("b.mp4 ", "x")], ",", "\n", "utf-8", csv.QUOTE_MINIMAL, False)
def test_what_csv_writes_in_any_dialect_and_encoding_comes_back_or_is_refused_with_its_line(
    rows: list[tuple[str, str]], delimiter: str, end: str, encoding: str, quoting: Any, sep: bool
) -> None:
    text = io.StringIO(newline="")
    if sep:
        text.write(f"sep={delimiter}{end}")
    if any("\r" in cell or "\n" in cell for row in rows for cell in row):
        quoting = csv.QUOTE_ALL  # Python before 3.13 quotes no line ends but its own: other spreadsheets do
    csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([("path", "text"), *rows])
    try:
        found = read(text.getvalue().encode(encoding))
    except ConfigError as error:
        assert re.match(r"captions\.csv(:\d+)?: ", str(error)) and "\n" not in str(error)
        blank = not any(path.strip() or caption.strip() for path, caption in rows)
        assert blank or "\0" in text.getvalue() or "looks like another row" in str(error), error
    else:
        wanted = [(path.strip(), caption.strip()) for path, caption in rows]
        assert [(path.strip(), caption) for path, caption in found] == [row for row in wanted if row != ("", "")]


@given(st.binary(max_size=60), st.sampled_from(["captions.csv", "x.json", "x.jsonl"]))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_bytes_are_rows_or_one_line_that_names_the_file(data: bytes, name: str) -> None:
    for content in (data, b"path,text\n" + data, b"[" + data, b'{"path": "a", "text": "b"' + data):
        try:
            read_table(content, name)
        except ConfigError as error:
            assert str(error).startswith(f"{name}:") and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("Path, Text\nclip.mp4, a box\n", [("clip.mp4", "a box")]),
        ('path,text\nclip.mp4, "a box, moving"\nb.mp4, b\n', [("clip.mp4", "a box, moving"), ("b.mp4", "b")]),
        ("path,text,,\nclip.mp4,a box,,\n,,,\n , \nb.mp4,b\n", [("clip.mp4", "a box"), ("b.mp4", "b")]),
        ("path,text,\nclip.mp4,a box,a note\n", [("clip.mp4", "a box")]),
        ("file_name;prompt;fps\nclip.mp4;a box, red;24\n", [("clip.mp4", "a box, red")]),
        ("path,text,caption,video\na.mp4,x,y,z\n", [("a.mp4", "x")]),
        ("clip.mp4,a box\nb.mov,b,24\n", [("clip.mp4", "a box"), ("b.mov", "b")]),
        ("clip.mp4\ta box, red\n", [("clip.mp4", "a box, red")]),
        ('sep=;\npath;text\nclip.mp4;"a ""red"" box"\n', [("clip.mp4", 'a "red" box')]),
        ('path,text\nclip.mp4,a 12" box\n', [("clip.mp4", 'a 12" box')]),
        ("path,text\nclip.mp4," + "word " * 60_000 + "\n", [("clip.mp4", ("word " * 60_000).strip())]),
        ("path,text\nclip.mp4," + "x" * (10 << 20) + "\n", [("clip.mp4", "x" * (10 << 20))]),
        (
            'path,text\na.mp4,=1+1\nb.mp4,"=HYPERLINK(""x"")"\n-c.mp4,@SUM(A1)\n',
            [("a.mp4", "=1+1"), ("b.mp4", '=HYPERLINK("x")'), ("-c.mp4", "@SUM(A1)")],
        ),
        (
            "path,id,relpath,num_frames,height,width,aspect_ratio,fps,resolution,text\na.mp4,a,a.mp4,12,64,96,0.67,24.0,6144,a box\n",
            [("a.mp4", "a box")],
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_tables_that_people_have_are_read(text: str, rows: list[tuple[str, str]]) -> None:
    assert [(path.strip(), caption) for path, caption in read(text)] == rows


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "captions.csv: no clips"),
        ("path,text\n", "captions.csv: no clips"),
        ("# my clips\npath,text\na.mp4,x\n", "captions.csv:1: the header is # my clips: it must name a column of files"),
        ("path,words\na.mp4,x\n", "captions.csv:1: the header is path,words: it must name"),
        ("file,caption,prompt\na.mp4,x,y\n", "captions.csv:1: columns caption and prompt may both be meant. Call the one that counts text"),
        ("path,text,path\na.mp4,x,y\n", "captions.csv:1: columns path and path may both be meant"),
        ("path,text\na.mp4,x, y\n", "captions.csv:2: 3 columns, the header has 2. Write every column, and quote texts that hold commas"),
        ("path;text\na.mp4;x; y\n", "quote texts that hold semicolons"),
        ("path,text\n\na.mp4\n", "captions.csv:3: 1 column, the header has 2"),
        ("a.mp4,x, y\n", "captions.csv:1: 3 columns; without a header"),
        ('path,text\na.mp4,"x\ny"\nb.mp4,"z\nc.mp4,w\n', "captions.csv:4: the quote that opens here is never closed"),
        (
            'path,text\nb.mp4,"z\nc.mp4,"w"\n',
            "captions.csv:2: the quoted text that begins here has something behind its closing quote on line 3",
        ),
        (
            'path,text\na.mp4,"a \\"red\\" box"\n',
            "captions.csv:2: the quoted text that begins here has something behind its closing quote here",
        ),
        ('path,text\na.mp4,"x\nb.mp4,y\nc.mp4,z"\n', "captions.csv:2: the quoted text of this row holds what looks like another row"),
        ('sep=;\npath;text\na.mp4;"x\n', "captions.csv:3: the quote that opens here"),
        ("path,text\ra.mp4,x\rb.mp4\r", "captions.csv:3: 1 column"),
        ("path,text\na.mp4,a \0 box\n", "captions.csv:2: a NUL character"),
        (b"path,text\na.mp4,x\nb.mp4,caf\xe9\n", "captions.csv:3: not UTF-8 at byte 27 (0xe9; in Windows-1252 it is 'é')"),
        ("path,text\na.mp4,x\n".encode("utf-16")[:-1], "captions.csv:2: not UTF-16 at byte"),
        ("path,text\na.mp4,x\n".encode("utf-16-le"), "captions.csv:1: a NUL character"),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_read_without_guessing_names_its_line(text: str | bytes, says: str) -> None:
    assert says in refusal(text)


def test_json_and_json_lines_are_the_same_rows() -> None:
    objects = [{"File_Name": path, "fps": 24, "prompt": text} for path, text in ROWS]
    wanted = [(path, text) for path, text in ROWS]
    assert read(json.dumps(objects, indent=1), "m.json") == read("\r\n".join(map(json.dumps, objects)) + "\n\n", "m.jsonl") == wanted
    assert read_table(json.dumps(objects, indent=1).encode(), "m.json").records[1] == Record(7, *ROWS[1])
    assert read_table(json.dumps(objects).encode("utf-16"), "m.json").said == "File_Name and prompt of each object, UTF-16"


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ('{"path": "a", "text": "b"}', "m.json", "m.json:1: not a list"),
        ('[{"path": "a", "text": "b"}\n{}]', "m.json", "m.json:2: the list is not closed here"),
        ('[{"path": "a", "text": "b"},\n\n{"path" "b"}]', "m.json", "m.json:3: no JSON (Expecting ':' delimiter)"),
        ('[{"path": "a", "text": "b"}]\n]', "m.json", "m.json:2: something behind the list"),
        ('{"path": "a", "text": "b"}\n{"path": "a"}\n', "m.jsonl", "m.jsonl:2: no caption among path. Name it text"),
        ('{"path": "a", "text": ["b", "c"]}', "m.jsonl", "m.jsonl:1: text is a list of 2, one text is needed"),
        ('{"path": "a", "text": null}', "m.jsonl", "m.jsonl:1: text is null"),
        ('\n["a", "b"]', "m.jsonl", "m.jsonl:2: not an object"),
        ('{"path": "a", "text": "\\ud800"}', "m.jsonl", "m.jsonl:1: text holds NUL or half of a character"),
        ("[" * 5000, "m.jsonl", "m.jsonl:1: no JSON that can be read"),
        ('{"path": "a", "text": ' + "9" * 5000 + "}", "m.jsonl", "m.jsonl:1: no JSON that can be read"),
        ("[]", "m.json", "m.json: no clips"),
    ],
    ids=lambda value: "",
)
def test_json_that_is_no_table_names_its_line(text: str, name: str, says: str) -> None:
    assert says in refusal(text, name)


def test_the_lines_of_a_file_are_the_same_with_every_line_end() -> None:
    assert read_lines(b"\xef\xbb\xbfa\r\nb \r\n\r\n", "x") == read_lines(b"a\nb", "x") == read_lines(b"a\rb\r", "x") == ["a", "b"]


def test_the_limit_of_other_readers_of_this_process_stays() -> None:
    before = csv.field_size_limit()
    read("path,text\na.mp4," + "x" * 200_000 + "\n")
    assert csv.field_size_limit() == before
