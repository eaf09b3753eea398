"""Query files and submissions: text stays text, errors say where, files are whole or absent."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import write_csv
from router.queries.submission import Query, read_queries, read_rows, write_submission, write_table
from router.system.errors import InputError

HEADER = "id,input,eval_type,answer_choices\n"


def file_of(tmp_path, text, header=HEADER):
    path = tmp_path / "queries.csv"
    path.write_bytes((header + text).encode())
    return path


def read(tmp_path, text, header=HEADER):
    return read_queries(file_of(tmp_path, text, header))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_another_encoding_is_refused(tmp_path, encoding):
    path = tmp_path / "queries.csv"
    path.write_bytes((HEADER + "1,\u00e4,generation,\n").encode(encoding))
    for file in (path, tmp_path / "absent.csv", tmp_path):
        with pytest.raises(InputError, match="CSV") as caught:
            read_queries(file)
        assert str(caught.value).startswith(str(file)) and "\0" not in str(caught.value)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_rows_end_as_on_any_system(tmp_path, end):
    text = f'1,"a\nb",generation,{end}2,\u00e4,generation,what stands here is no matter'
    expected = [Query("1", "a\nb", "generation"), Query("2", "\u00e4", "generation")]
    assert read(tmp_path, text, HEADER.strip() + end) == expected
    assert read(tmp_path, text, "\ufeff" + HEADER.strip() + end) == expected  # a byte order mark
    mixed = f"adapter,eval_type,input,answer_choices,id{end}"
    (query,) = read(tmp_path, "x,multiple_choice,Which?,\"['a', 'b']\",q7", mixed)
    assert query == Query("q7", "Which?", "multiple_choice", ("a", "b"))
    path = file_of(tmp_path, f'a,"x\ny"{end}{end}b,z{end}', header=f"adapter,more{end}")
    rows = [(3, {"adapter": "a", "more": "x\ny"}), (5, {"adapter": "b", "more": "z"})]
    assert list(read_rows(path, ["adapter"])) == rows


@pytest.mark.slow
@given(st.text() | st.sampled_from(["NA", "None", "nan", "NULL", "007", "1e5", "True", " blanks ", "a\0b"]))
@example("x" * 2_000_000)
@example('one\rtwo\r\nthree\nfour\t,"five"\r')
def test_any_text_is_an_input_and_comes_back(text):
    queries = [Query('q,"1"', text, "generation"), Query("2", "b", "generation")]
    with TemporaryDirectory() as folder:
        file, out = Path(folder, "queries.csv"), Path(folder, "out.csv")
        write_table(file, HEADER.strip().split(","), [(of.id, of.input, "generation", "") for of in queries])
        assert read_queries(file) == queries
        write_submission(out, queries, [text, "b"])
        frame = pd.read_csv(out, dtype=str, keep_default_na=False)
        if "\0" not in text:  # which ends a field for pandas
            assert frame["prediction"].tolist() == [text if text.strip() else "unknown", "b"]
            assert frame["id"].tolist() == ['q,"1"', "2"] and frame["dummy_field"].tolist() == ["0", "0"]
        (_, row), _ = read_rows(out, ["prediction"])
        assert row["prediction"] == (text if text.strip() else "unknown")


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("['yes', 'no']", ("yes", "no")), ("""["it's", 'so, so']""", ("it's", "so, so")),
        ("('a', 'b')", ("a", "b")), ("[1, 2.5]", ("1", "2.5")),
        ("""["he said 'a' 'b'", 'c']""", ("he said 'a' 'b'", "c")), ("['a' , 'b',]", ("a", "b")),
        ("['a',  # b\n'c']", ("a", "c")),
        (json.dumps(["😀 ü", "\ud83d"]), ("😀 ü", "\ud83d")), (json.dumps(["😀", 3]), ("😀", "3")),
        (pd.Series(["km/h", "a"]).to_json(orient="values"), ("km/h", "a")),  # spelt km\/h
        ("None", ("Which?",)), ("", ("Which?",)),  # no choices: as in the kit, the input is the only one
    ],
)  # fmt: skip
def test_choices(tmp_path, text, choices):
    rows = [("1", "Which?", "multiple_choice", text)]
    path = write_csv(tmp_path / "queries.csv", HEADER.strip().split(","), rows)
    assert read_queries(path)[0].choices == choices


# A file, where the error is, and what it names.
WRONG = {
    "missing column": ("id,input,answer_choices\n1,a,\n", [], ["eval_type", "id, input"]),
    "empty": ("", [], []),
    "header only": (HEADER, [], []),
    "a column twice": ("id," + HEADER, [], ["'id'"]),
    "a cursor": ("\x1b[2J" + HEADER, [], [r"\x1b[2Jid, input"]),
    "eval_type": (
        HEADER + '1,"two\nlines",generation,\n2,b,choice,\n',
        ["line 4", "column eval_type"], ["generation", "multiple_choice", "'choice'"],
    ),
    "eval_type empty": (HEADER + "1,a,,\n", ["line 2", "column eval_type"], ["''"]),
    "duplicate id": (
        HEADER + "7,a,generation,\n8,b,generation,\n7,c,generation,\n",
        ["line 4", "column id"], ["'7'", "line 2"],
    ),
    "no id": (HEADER + "1,a,generation,\n,b,generation,\n", ["line 3", "column id"], ["''"]),
    "too few fields": (HEADER + "1,a,generation,\n2,b\n", ["line 3"], ["4 fields", "fewer"]),
    "too many fields": (HEADER + "1,a, b,generation,\n", ["line 2"], ["4 fields", "more"]),
    "open quote": (
        HEADER + '1,"a\nb",generation,\n2,"b,generation,\n3,c,generation,\n', ["after line 3"], ["quote"],
    ),
    "open quote and others": (HEADER + '1,"a,generation,\n2,"b",generation,\n', ["after line 1"], ["quote"]),
    **{
        f"choices {text[:20]}": (
            HEADER + f'1,a,multiple_choice,"{text}"\n',
            [f"line {2 + text.count(chr(10))}", "column answer_choices"], [],
        )
        for text in (
            "yes or no", "['a',", "__import__('os').getcwd()", "[[1], 2]", "{'a': 1}", "[" * 100_000, "[]",
            "()", "['yes' 'no' 'maybe']", "['yes'\n 'no']", "['a', 'b' 'c']", "['yes' # or\n 'no']",
            f"[{'7' * 5000}, 1]", f"[0x{'f' * 6000}, 1]",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_errors_name_file_line_and_column(tmp_path, kind):
    text, places, causes = WRONG[kind]
    path = file_of(tmp_path, text, header="")
    with pytest.raises(InputError) as caught:
        read_queries(path)
    where, _, what = str(caught.value).partition(": ")
    assert where.split(", ") == [str(path), *places]
    assert all(cause in what for cause in causes) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "end", [b'5,"open,generation,', b'5,"a"b,generation,', "5,\u00e4,generation,".encode("latin-1")]
)
def test_where_a_file_breaks_off_what_came_before_is_told(tmp_path, end):
    path = tmp_path / "q.csv"
    long = "b" * 100_000  # more than is decoded at once
    path.write_bytes(f"{HEADER}1,a,guess,\n2,{long},generation,\n".encode() + end)
    with pytest.raises(InputError) as caught:
        read_queries(path)
    first, last = str(caught.value).splitlines()
    assert "line 2, column eval_type" in first and last.startswith(f"{path}, after line ")


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    def problems(*rows):
        with pytest.raises(InputError) as caught:
            read(tmp_path, "\n".join(rows))
        return str(caught.value).splitlines()

    rows = ["1,a,generation,", "5,too,many,of,them", "1,b,generation,", "2,c,guess,"]
    rows += ["3,d,multiple_choice,none", "4,e,generation,", "6"]
    places = ["line 3: ", "line 4, column id", "line 5, column eval_type", "line 6, column answer_choices"]
    places += ["line 8: "]
    for place, line in zip(places, problems(*rows), strict=True):
        assert place in line
    many = problems(*(f"{n},a,guess," for n in range(50)))
    assert len(many) == 21 and many[-1].startswith("and 30 more") and "line 2," in many[0]
