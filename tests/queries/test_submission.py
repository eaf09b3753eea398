"""Query files and submissions: text stays text, errors say where, files are whole or absent."""

import csv
import random

import pandas as pd
import pytest

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


@pytest.mark.parametrize("text", ["NA", "None", "nan", "NULL", "", "007", "1e5", "True", " blanks "])
def test_text_stays_text(tmp_path, text):
    (query,) = read(tmp_path, f"{text or 0},{text},generation,None\n")
    assert query == Query(text or "0", text, "generation")


def test_control_characters_in_a_field_stay(tmp_path):
    text = 'one\rtwo\r\nthree\nfour\t,"five"\r'
    quoted = text.replace('"', '""')
    first, second = read(tmp_path, f'1,"{quoted}",generation,\n2,b,generation,\n')
    assert first.input == text
    assert (second.id, second.input) == ("2", "b")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert read(tmp_path, "1,ä,generation,\n", header="\ufeff" + HEADER)[0] == Query("1", "ä", "generation")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_another_encoding_is_refused(tmp_path, encoding):
    path = tmp_path / "queries.csv"
    path.write_bytes((HEADER + "1,a,generation,\n").encode(encoding))
    with pytest.raises(InputError, match="UTF-8") as told:
        read_queries(path)
    assert "\0" not in str(told.value)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_rows_end_as_on_any_system(tmp_path, end):
    text = f'1,"a\nb",generation,{end}2,c,generation,'
    assert read(tmp_path, text, HEADER.strip() + end) == [
        Query("1", "a\nb", "generation"), Query("2", "c", "generation")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "a\0b",
        "",
        "\u05e9\u05dc\u05d5\u05dd, \u202e",
        "\u0645\u0631\u062d\u0628\u0627",
        "\U0001f9d1\u200d\U0001f680 e\u0301",
        "x" * 2_000_000,
    ],
)
def test_any_text_is_an_input_and_comes_back(tmp_path, text):
    path = tmp_path / "queries.csv"
    write_table(path, ("id", "input", "eval_type", "answer_choices"), [("1", text, "generation", "")])
    assert read_queries(path) == [Query("1", text, "generation")]
    write_submission(tmp_path / "out.csv", read_queries(path), [text])
    ((_, row),) = read_rows(tmp_path / "out.csv", ["prediction"])
    assert row["prediction"] == (text or "unknown")


def test_columns_come_in_any_order_with_others_between(tmp_path):
    header = "adapter,eval_type,input,answer_choices,id\n"
    (query,) = read(tmp_path, "x,multiple_choice,Which?,\"['a', 'b']\",q7\n", header)
    assert query == Query("q7", "Which?", "multiple_choice", ("a", "b"))


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("\"['yes', 'no']\"", ("yes", "no")),
        ('"[""it\'s"", \'so, so\']"', ("it's", "so, so")),
        ("\"('a', 'b')\"", ("a", "b")),
        ('"[1, 2.5]"', ("1", "2.5")),
        ("None", ("Which?",)),  # no choices: as in the kit, the input is the only one
        ("", ("Which?",)),
    ],
)
def test_choices(tmp_path, field, choices):
    assert read(tmp_path, f"1,Which?,multiple_choice,{field}\n")[0].choices == choices


@pytest.mark.parametrize("field", ["[]", "()"])
def test_an_empty_list_of_choices_is_refused_by_row(tmp_path, field):
    with pytest.raises(InputError, match="line 3, column answer_choices: ") as caught:
        read(tmp_path, f"1,Why?,generation,\n2,Which?,multiple_choice,{field}\n")
    assert field in str(caught.value)


def test_eval_type_alone_decides(tmp_path):
    rows = "1,Which?,generation,\"['a', 'b']\"\n2,Why?,generation,whatever stands here\n"
    assert read(tmp_path, rows) == [
        Query("1", "Which?", "generation"), Query("2", "Why?", "generation")
    ]  # fmt: skip


@pytest.mark.parametrize("number", ["7" * 5000, "0x" + "f" * 6000])
def test_a_number_of_thousands_of_digits_is_refused(tmp_path, number):
    rows = [("1", "Which?", "multiple_choice", f"[{number}, 1]"), ("2", "Why?", "generation", "")]
    path = write_csv(tmp_path / "queries.csv", HEADER.strip().split(","), rows)
    with pytest.raises(InputError, match="line 2, column answer_choices"):
        read_queries(path)


WRONG = {
    "missing column": ("id,input,answer_choices\n1,a,\n", [], ["eval_type is missing", "found: id, input"]),
    "empty": ("", [], ["found: nothing"]),
    "header only": (HEADER, [], ["at least one query"]),
    "eval_type": (
        HEADER + '1,"two\nlines",generation,\n2,b,choice,\n',
        ["line 4", "column eval_type"],
        ["generation or multiple_choice", "'choice'"],
    ),
    "eval_type empty": (HEADER + "1,a,,\n", ["line 2", "column eval_type"], ["got ''"]),
    "no list": (
        HEADER + "1,a,generation,\n2,b,multiple_choice,yes or no\n",
        ["line 3", "column answer_choices"],
        ["Python list", "'yes or no'"],
    ),
    "open list": (HEADER + "1,a,multiple_choice,\"['a',\"\n", ["line 2", "column answer_choices"], ["['a',"]),
    "a call": (
        HEADER + "1,a,multiple_choice,\"__import__('os').getcwd()\"\n",
        ["line 2", "column answer_choices"],
        ["Python list"],
    ),
    "nested list": (
        HEADER + '1,a,multiple_choice,"[[1], 2]"\n',
        ["line 2", "column answer_choices"],
        ["[[1]"],
    ),
    "duplicate id": (
        HEADER + "7,a,generation,\n8,b,generation,\n7,c,generation,\n",
        ["line 4", "column id"],
        ["'7'", "line 2", "unique"],
    ),
    "too few fields": (HEADER + "1,a,generation,\n2,b\n", ["line 3"], ["expected 4 fields", "fewer"]),
    "too many fields": (HEADER + "1,a, b,generation,\n", ["line 2"], ["expected 4 fields", "more"]),
    "open quote": (
        HEADER + '1,"a\nb",generation,\n2,"b,generation,\n3,c,generation,\n',
        ["after line 3"],
        ["each quote closed"],
    ),
    "open quote and others": (
        HEADER + '1,"a,generation,\n2,"b",generation,\n',
        ["after line 1"],
        ["each quote closed"],
    ),
    "a column twice": ("id," + HEADER, [], ["the column 'id' stands twice"]),
    "no id": (HEADER + "1,a,generation,\n,b,generation,\n", ["line 3", "column id"], ["an id, got ''"]),
    "a cursor": ("\x1b[2J" + HEADER, [], ["id is missing", r"found: \x1b[2Jid, input"]),
    "a choice for a list": (
        HEADER + "1,a,multiple_choice,\"{'a': 1}\"\n",
        ["line 2", "column answer_choices"],
        ["Python list"],
    ),
    "deep": (
        HEADER + f"1,a,multiple_choice,{'[' * 100_000}\n",
        ["line 2", "column answer_choices"],
        ["Python list"],
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_errors_name_file_line_and_column(tmp_path, kind):
    text, places, causes = WRONG[kind]
    path = file_of(tmp_path, text, header="")
    with pytest.raises(InputError) as caught:
        read_queries(path)
    where, _, what = str(caught.value).partition(": ")
    assert where.split(", ") == [str(path), *places]
    assert all(cause in what for cause in causes)


def test_what_is_no_text_file_is_named(tmp_path):
    latin = tmp_path / "latin.csv"
    latin.write_bytes(HEADER.encode() + "1,ä,generation,\n".encode("latin-1"))
    for path in (latin, tmp_path / "absent.csv", tmp_path):
        with pytest.raises(InputError, match=r"expected (a )?CSV") as caught:
            read_queries(path)
        assert str(caught.value).startswith(str(path))


def test_rows_bring_their_lines_and_all_columns(tmp_path):
    path = file_of(tmp_path, 'a,"x\ny"\n\nb,z\n', header="adapter,more\n")
    assert list(read_rows(path, ["adapter"])) == [
        (3, {"adapter": "a", "more": "x\ny"}),
        (5, {"adapter": "b", "more": "z"}),
    ]


def test_a_submission_keeps_order_and_has_no_empty_prediction(tmp_path):
    queries = [Query(name, "?", "generation") for name in ("z", "a", "m", "b")]
    write_submission(tmp_path / "out.csv", queries, ["one", "", " \n ", " two"])
    expected = b"id,prediction,dummy_field\nz,one,0\na,unknown,0\nm,unknown,0\nb, two,0\n"
    assert (tmp_path / "out.csv").read_bytes() == expected
    with pytest.raises(ValueError, match="shorter"):
        write_submission(tmp_path / "out.csv", queries, ["one"])
    assert (tmp_path / "out.csv").read_bytes() == expected


def test_a_submission_is_written_as_pandas_does(tmp_path):
    rng = random.Random(0)
    texts = [
        'a "quoted" word',
        "a, b",
        "two\nlines",
        "'",
        '"',
        ",",
        "NA",
        " blank ",
        "12",
        "äöü 漢字 🙂",
        "\\n",
    ]
    texts += ["".join(rng.choices("ab,\"'\n\t ;", k=12)) + "." for _ in range(100)]
    queries = [Query(f"q,{n}" if n % 7 == 0 else str(n), "?", "generation") for n in range(len(texts))]
    write_submission(tmp_path / "ours.csv", queries, texts)
    frame = pd.DataFrame({"id": [q.id for q in queries], "prediction": texts, "dummy_field": 0})
    frame.to_csv(tmp_path / "pandas.csv", index=False)
    assert (tmp_path / "ours.csv").read_bytes() == (tmp_path / "pandas.csv").read_bytes()


@pytest.mark.parametrize("text", ["one\rtwo", "one\r\ntwo", "\rone"])
def test_a_carriage_return_does_not_break_a_submission(tmp_path, text):
    queries = [Query(str(n), "?", "generation") for n in range(2)]
    write_submission(tmp_path / "out.csv", queries, [text, "b"])
    frame = pd.read_csv(tmp_path / "out.csv", dtype=str, keep_default_na=False)
    assert frame["prediction"].tolist() == [text, "b"]
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["prediction"] for row in csv.DictReader(file, strict=True)] == [text, "b"]


def test_rows_that_break_off_leave_no_table(tmp_path):
    def rows():
        yield ["1"]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_table(tmp_path / "out.csv", ["a"], rows())
    assert list(tmp_path.iterdir()) == []


def test_the_competitions_queries_are_read_whole(competition):
    queries = read_queries(competition / "test.csv")
    assert len(queries) == 807
    choices = [len(query.choices) for query in queries if query.eval_type == "multiple_choice"]
    assert {n: choices.count(n) for n in (2, 4, 8)} == {2: 100, 4: 307, 8: 50}
    assert sum(query.eval_type == "generation" for query in queries) == 350
    assert next(query for query in queries if query.id == "672").input.count("\r") == 3
    assert len(read_queries(competition / "cosmos_qa.csv")) == 500
    assert max(len(query.input) for query in read_queries(competition / "xsum.csv")) == 9513


def with_choices(tmp_path, text):
    path = tmp_path / "queries.csv"
    write_table(path, ("id", "input", "eval_type", "answer_choices"), [("1", "?", "multiple_choice", text)])
    return path


@pytest.mark.parametrize(
    "text",
    [
        "['yes' 'no' 'maybe']",
        "['yes'\n 'no']",
        "['a', 'b' 'c']",
        "['yes' # or\n 'no']",
        "['a' #\n#\n 'b', 1]",
    ],
)
def test_choices_without_a_comma_are_refused_instead_of_joined(tmp_path, text):
    with pytest.raises(InputError, match="column answer_choices"):
        read_queries(with_choices(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("""["he said 'a' 'b'", 'c']""", ("he said 'a' 'b'", "c")),
        ("['a' , 'b',]", ("a", "b")),
        ("['a',  # b\n'c']", ("a", "c")),
    ],
)
def test_quotes_within_choices_are_no_missing_comma(tmp_path, text, choices):
    assert read_queries(with_choices(tmp_path, text))[0].choices == choices


@pytest.mark.parametrize(
    "end", [b'5,"open,generation,', b'5,"a"b,generation,', "5,ä,generation,".encode("latin-1")]
)
def test_where_a_file_breaks_off_what_came_before_is_told_too(tmp_path, end):
    path = tmp_path / "q.csv"
    long = "b" * 100_000  # more than is decoded at once
    path.write_bytes(f"{HEADER}1,a,guess,\n2,{long},generation,\n".encode() + end)
    with pytest.raises(InputError) as caught:
        read_queries(path)
    first, last = str(caught.value).splitlines()
    assert "line 2, column eval_type" in first and last.startswith(f"{path}, after line ")


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    rows = ["1,a,generation,", "5,too,many,of,them", "1,b,generation,", "2,c,guess,"]
    rows += ["3,d,multiple_choice,none", "4,e,generation,", "6"]
    path = tmp_path / "q.csv"
    path.write_text("\n".join(["id,input,eval_type,answer_choices", *rows]))
    with pytest.raises(InputError) as caught:
        read_queries(path)
    told = str(caught.value).splitlines()
    places = ["line 3: expected 4 fields, got more", "line 4, column id", "line 5, column eval_type"]
    places += ["line 6, column answer_choices", "line 8: expected 4 fields, got fewer"]
    assert len(told) == 5 and all(place in line for place, line in zip(places, told, strict=True))
    path.write_text("\n".join(["id,input,eval_type,answer_choices", *(f"{n},a,guess," for n in range(50))]))
    with pytest.raises(InputError) as caught:
        read_queries(path)
    told = str(caught.value).splitlines()
    assert len(told) == 21 and told[-1] == "and 30 more like these" and "line 2," in told[0]
