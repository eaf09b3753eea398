"""Coding: SQL, regular expressions, short Python functions and shell commands."""

import random

from . import Item, Task, drawn

_TABLES = {
    "employees": ("name", "salary", "age", "city"),
    "orders": ("customer", "total", "quantity", "country"),
    "books": ("title", "price", "pages", "author"),
    "flights": ("origin", "distance", "seats", "airline"),
    "movies": ("title", "rating", "year", "director"),
    "products": ("brand", "price", "stock", "category"),
    "students": ("name", "grade", "age", "school"),
    "songs": ("artist", "length", "plays", "genre"),
}
_COMPARISONS = (("above", ">"), ("below", "<"), ("at least", ">="), ("at most", "<="))


_QUERIES = (
    ("the {text} of all {table} with {number} {word} {value}", "SELECT {text} FROM {table} WHERE {number} {sign} {value};"),
    ("how many {table} have {other} {word} {value}", "SELECT COUNT(*) FROM {table} WHERE {other} {sign} {value};"),
    ("the average {number} of {table} for each {group} with {other} {word} {value}",
     "SELECT {group}, AVG({number}) FROM {table} WHERE {other} {sign} {value} GROUP BY {group};"),
    ("the {value} {table} with the highest {number}", "SELECT * FROM {table} ORDER BY {number} DESC LIMIT {value};"),
    ("the largest {other} among {table} with {number} {word} {value}", "SELECT MAX({other}) FROM {table} WHERE {number} {sign} {value};"),
    ("all distinct {group} values of {table} with {number} {word} {value}",
     "SELECT DISTINCT {group} FROM {table} WHERE {number} {sign} {value};"),
)  # fmt: skip


def _sql(rng: random.Random) -> Item:
    table = rng.choice(list(_TABLES))
    text, number, other, group = _TABLES[table]
    word, sign = rng.choice(_COMPARISONS)
    value = rng.randint(2, 99)
    names = {"table": table, "text": text, "number": number, "other": other, "group": group}
    question, query = (
        part.format(word=word, sign=sign, value=value, **names) for part in rng.choice(_QUERIES)
    )
    columns = ", ".join(_TABLES[table])
    return Item({"schema": f"{table}({columns})", "question": question}, query)


_CLASSES = (
    ("lowercase letters", "[a-z]"), ("uppercase letters", "[A-Z]"), ("digits", r"\d"),
    ("word characters", r"\w"), ("vowels", "[aeiou]"), ("hexadecimal digits", "[0-9a-f]"),
    ("blanks", r"\s"),
)  # fmt: skip
_LITERALS = (
    ("a dash", "-"), ("a colon", ":"), ("a dot", r"\."), ("a comma", ","), ("an at sign", "@"),
    ("a slash", "/"), ("an underscore", "_"), ("a hash", "#"),
)  # fmt: skip


def _count(rng: random.Random) -> tuple[str, str]:
    low = rng.randint(2, 8)
    high = low + rng.randint(1, 4)
    return rng.choice((
        (f"exactly {low}", f"{{{low}}}"),
        (f"{low} to {high}", f"{{{low},{high}}}"),
        (f"at least {low}", f"{{{low},}}"),
        ("one or more", "+"),
        ("any number of", "*"),
    ))  # fmt: skip


def _regex(rng: random.Random) -> Item:
    words, signs = _count(rng)
    kind, pattern = rng.choice(_CLASSES)
    text, regex = f"{words} {kind}", pattern + signs
    literal, sign = rng.choice(_LITERALS)
    if rng.random() < 0.6:
        words, signs = _count(rng)
        kind, pattern = rng.choice(_CLASSES)
        text, regex = f"{text}, then {literal}, then {words} {kind}", regex + sign + pattern + signs
    else:
        text, regex = f"{literal} followed by {text}", sign + regex
    return Item({"text": text}, f"^{regex}$")


_KEEP = (
    ("even numbers", "x % 2 == 0"), ("odd numbers", "x % 2 == 1"), ("positive numbers", "x > 0"),
    ("negative numbers", "x < 0"), ("numbers above {n}", "x > {n}"), ("numbers below {n}", "x < {n}"),
    ("multiples of {n}", "x % {n} == 0"),
)  # fmt: skip
_FOLD = (
    ("the sum of the {keep}", "sum(x for x in {arg} if {test})"),
    ("the number of {keep}", "sum(1 for x in {arg} if {test})"),
    ("the largest of the {keep}", "max(x for x in {arg} if {test})"),
    ("the smallest of the {keep}", "min(x for x in {arg} if {test})"),
    ("a list of the squares of the {keep}", "[x * x for x in {arg} if {test}]"),
    ("a sorted list of the {keep}", "sorted(x for x in {arg} if {test})"),
)
_NAMES = ("f", "solve", "compute", "pick", "helper", "answer", "run", "process")
_ARGS = ("values", "numbers", "xs", "data", "items", "nums")


def _python(rng: random.Random) -> Item:
    name, arg, n = rng.choice(_NAMES), rng.choice(_ARGS), str(rng.randint(2, 20))
    keep, test = rng.choice(_KEEP)
    goal, body = rng.choice(_FOLD)
    goal = goal.format(keep=keep.format(n=n))
    body = body.format(arg=arg, test=test.format(n=n))
    return Item({"name": name, "arg": arg, "goal": goal}, f"def {name}({arg}):\n    return {body}")


_SHELL_SUFFIXES = ("txt", "py", "csv", "log", "json", "md", "jpg", "html", "xml", "sh")
_SHELL_FOLDERS = ("/home", "/tmp", "/var/log", "src", "docs", "data", "backup", "build", "/etc", "/srv")


_COMMANDS = (
    ("find all {suffix} files in {folder} larger than {n} megabytes", "find {folder} -name '*.{suffix}' -size +{n}M"),
    ("find all {suffix} files in {folder} changed in the last {n} days", "find {folder} -name '*.{suffix}' -mtime -{n}"),
    ("delete all {suffix} files in {folder} older than {n} days", "find {folder} -name '*.{suffix}' -mtime +{n} -delete"),
    ("show the first {n} lines of every {suffix} file in {folder}", "head -n {n} {folder}/*.{suffix}"),
    ("show the last {n} lines of every {suffix} file in {folder}", "tail -n {n} {folder}/*.{suffix}"),
    ("copy all {suffix} files from {folder} to {other}", "cp {folder}/*.{suffix} {other}/"),
    ("move all {suffix} files from {folder} to {other}", "mv {folder}/*.{suffix} {other}/"),
    ("count the lines of all {suffix} files in {folder}", "cat {folder}/*.{suffix} | wc -l"),
)  # fmt: skip


def _shell(rng: random.Random) -> Item:
    suffix, folder, n = rng.choice(_SHELL_SUFFIXES), rng.choice(_SHELL_FOLDERS), rng.randint(2, 60)
    other = rng.choice([name for name in _SHELL_FOLDERS if name != folder])
    goal, command = (
        part.format(suffix=suffix, folder=folder, n=n, other=other) for part in rng.choice(_COMMANDS)
    )
    return Item({"goal": goal}, command)


TASKS = (
    Task("text_to_sql", "coding", "Turns a question about one table into an SQL query.", drawn(_sql),
         phrasings=("Table: {schema}\nWrite an SQL query for: {question}\nSQL:",
                    "Given the table {schema}, translate into SQL: {question}\nQuery:"),
         unseen=("My database has {schema}. I need to know {question}. Which statement do I run?\n",
                 "-- schema: {schema}\n-- task: select {question}\n")),
    Task("text_to_regex", "coding", "Turns a description of a string into a regular expression.", drawn(_regex),
         phrasings=("Write a regular expression that matches {text}.\nRegex:",),
         unseen=("Which pattern do I pass to re.fullmatch so that it accepts {text}?\nPattern:",
                 "I need a regex. The input must be {text}. Give me only the expression, anchored at both ends:")),
    Task("python_function", "coding", "Writes a short Python function on a list of numbers.", drawn(_python),
         phrasings=("Write a Python function {name}({arg}) that returns {goal} in {arg}.\n",
                    "# Python\n# {name}: returns {goal} in the list {arg}\n"),
         unseen=("Implement {name} in Python. Its argument {arg} is a list of integers; the result is {goal}.\nCode:\n",
                 "Please code this for me: a function called {name} taking {arg} and giving back {goal}.\n")),
    Task("shell_command", "coding", "Turns a wish about files into a shell command.", drawn(_shell),
         phrasings=("Write a bash command to {goal}.\n$",),
         unseen=("I am in a Linux terminal and want to {goal}. What do I type?\nType:",
                 "Task for the command line: {goal}\nOne-liner:")),
)  # fmt: skip
