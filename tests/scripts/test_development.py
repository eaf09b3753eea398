"""The libraries that choices are made on: their queries are labelled, and foreign ones are nobody's."""

import pandas as pd

from router.constants import BASE_COLUMN
from scripts.bench import development
from scripts.bench.score import score
from scripts.library.development import LIBRARIES, TASKS, asked


def test_every_clone_has_the_committed_library_with_all_kinds_of_queries():
    (committed,) = (one for one in development.libraries() if one.name == development.COMMITTED)
    rows = committed.rows
    names = {path.name for path in committed.adapters.iterdir() if path.is_dir()}
    assert set(rows["split"]) - {"flan"} == {"own", "unseen", "none", "foreign"}
    assert set(rows.loc[rows["split"].isin(["own", "unseen"]), "adapter"]) == names
    assert set(rows.loc[rows["split"].isin(["none", "foreign", "flan"]), "adapter"]) == {BASE_COLUMN}
    assert not rows.duplicated(["split", "task", "id"]).any() and not rows["input"].eq("").any()


def test_foreign_queries_are_of_many_kinds_and_in_no_librarys_own_words():
    (committed,) = (one for one in development.libraries() if one.name == development.COMMITTED)
    foreign = committed.rows[committed.rows["split"] == "foreign"]
    assert foreign["task"].nunique() >= 8
    others = set(committed.rows.loc[committed.rows["split"] != "foreign", "input"])
    assert not others & set(foreign["input"])
    for row in foreign.itertuples():
        choices = row.eval_type == "multiple_choice"
        assert row.metric == ("exact" if choices else "contains" if row.target else "none")
        right = row.target.split("|")[0]
        assert pd.isna(value := score(row.metric, right, row.target)) or value == 1


def test_a_folder_of_a_library_is_read_with_its_own_base_model(tmp_path, monkeypatch):
    folder = tmp_path / "otherbase"
    (folder / "library").mkdir(parents=True)
    (folder / "base").mkdir()
    (folder / "queries.csv").write_text(
        "id,input,eval_type,answer_choices\n0,a,generation,\n1,b,generation,\n"
    )
    (folder / "labels.csv").write_text("id,task,split,metric,target\n1,sums,none,em,x\n0,sums,own,em,y\n")
    monkeypatch.setattr(development, "BUILT", tmp_path)
    monkeypatch.setattr(development, "SHARED", tmp_path / "nothing")
    first, *_ = development.libraries()
    assert (first.name, first.base, first.adapters) == ("otherbase", str(folder / "base"), folder / "library")
    own = first.rows[first.rows["split"] != "foreign"]
    assert own[["id", "adapter", "target"]].values.tolist() == [["0", "sums", "y"], ["1", BASE_COLUMN, "x"]]


def test_the_built_libraries_ask_in_training_and_in_other_phrasings_with_answers():
    for plan in LIBRARIES.values():
        for name in plan.experts:
            questions = asked(TASKS[name])
            assert set(questions) == {"own", "unseen"}
            for items, prompts in questions.values():
                assert len(items) == len(prompts) == 20 and all(item.answer for item in items)
                assert all("{" not in prompt for prompt in prompts)
            assert not set(questions["own"][1]) & set(questions["unseen"][1])
