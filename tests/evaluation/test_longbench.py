"""LongBench's metrics by hand-worked examples, and the command on rows made here."""

import json
import pathlib

import pytest

from path_jax.evaluation import longbench
from path_jax.evaluation.longbench import TASKS, main, prompt_text, read_rows, score_of, summary, without_middle

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"


@pytest.mark.parametrize(
    "metric, prediction, answer, expected",
    [
        ("token_f1", "The cat, a Cat!", "the black cat", 2 * 1 / 4),  # cat cat | black cat
        ("token_f1", "An", "the", 0.0),
        ("character_f1", "北京。", "“北 京市”", 2 * 2 / 5),
        ("rouge_l", "a b c d", "a x c y d z", 2 * 3 / 10),
        ("rouge_l", "", "a", 0.0),
        ("character_rouge_l", "甲乙丙", "甲丙", 4 / 5),
        ("number_share", "Paragraph 3, or 5", "Paragraph 3", 0.5),
        ("number_share", "none", "3", 0.0),
        ("code_similarity", "# note\n\n  x = 1\ny", "  x = 1", 1.0),
        ("code_similarity", "abcd", "bcde", 0.75),
        ("code_similarity", "// nothing", "x", 0.0),
    ],
)
def test_metrics(metric, prediction, answer, expected):
    assert getattr(longbench, metric)(prediction, answer, ()) == pytest.approx(expected)


def test_classification():
    classes = ["city", "big city", "person"]
    assert longbench.classification("a big city", "big city", classes) == 1  # "city" is a part of its name
    assert longbench.classification("big city or person", "big city", classes) == 0.5
    assert longbench.classification("city", "person", classes) == 0
    assert longbench.classification("a big city", "city", classes) == 0.5


def test_the_best_answer_counts_and_first_lines():
    row = dict(answers=["no", "yes indeed"], all_classes=None)
    assert score_of(TASKS["qasper"], "yes", row) == pytest.approx(100 * 2 / 3)
    assert score_of(TASKS["triviaqa"], "\nno\nPassage: yes", row) == 100
    assert score_of(TASKS["hotpotqa"], "\nno\nPassage: yes", row) < 100


def test_prompts():
    row = dict(input="QUESTION", context="CONTEXT {brace}")
    for name, task in TASKS.items():
        text = prompt_text(task.prompt, row)
        assert text.count("CONTEXT {brace}") == 1, name
        has_question = name not in ("gov_report", "multi_news", "vcsum", "passage_count")
        assert text.count("QUESTION") == has_question, name
    with pytest.raises(ValueError, match="does not fit a row"):
        prompt_text("{question}", row)


def test_the_middle_is_left_out():
    assert without_middle(range(10), 5) == [0, 1, 7, 8, 9] and without_middle(range(3), 3) == [0, 1, 2]
    assert without_middle(range(4), 2) == [0, 3]


def test_groups_by_length():
    rows = [dict(length=length) for length in (10, 3999, 4000, 20000)]
    found = summary([0, 100, 30, 60], rows, by_length=True)
    assert found == {"score": 47.5, "rows": 4, "0-4k": 50, "4-8k": 30, "8k+": 60}
    assert summary([1.0], rows, by_length=False) == {"score": 1.0, "rows": 1}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_command(tmp_path, capsys):
    row = dict(input="Which?", context="word " * 200, answers=["a", "b"], length=200, all_classes=["a", "b"])
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "trec_e.jsonl", [row, row | dict(context="short", length=5000)])
    write_rows(tmp_path / "data" / "passage_count.jsonl", [row | dict(answers=["7"])] * 3)
    (tmp_path / "prompts.json").write_text(json.dumps(dict(trec="{context}|{input}", other="unused")))
    argv = [
        f"--checkpoint={GOLDEN / 'fla_path'}", f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'x' / 'out.json'}",
        f"--prompts={tmp_path / 'prompts.json'}", f"--predictions={tmp_path / 'answers.jsonl'}", "--max-length=96",
        "--batch-size=2", "--limit=2",
    ]  # fmt: skip
    main(argv)
    assert "passage_count" in capsys.readouterr().out
    found = json.loads((tmp_path / "x" / "out.json").read_text())
    assert set(found["results"]) == {"trec_e", "passage_count"} and found["max_length"] == 96
    scores = [result["score"] for result in found["results"].values()]
    assert found["average"] == pytest.approx(sum(scores) / 2)
    assert {"0-4k", "4-8k"} < set(found["results"]["trec_e"]) and found["results"]["passage_count"]["rows"] == 2
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert (
        len(answers) == 4 and answers[2]["dataset"] == "trec_e" and answers[0]["prediction"] == answers[1]["prediction"]
    )


def test_input_that_cannot_work(tmp_path):
    bad = tmp_path / "lcc.jsonl"
    for text, message in (("{}", "is not a row"), ("", "has no rows"), ('{"input": 1}', ":1 is not a row")):
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(bad)
    (tmp_path / "empty").mkdir()
    for options, message in (
        (["--data=nowhere"], "is not a directory"),
        ([f"--data={tmp_path / 'empty'}"], "has no .jsonl files"),
        ([f"--data={tmp_path}", "--datasets=what"], "what is not a dataset of LongBench"),
        ([f"--data={tmp_path}", "--datasets=trec"], "trec.jsonl"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([f"--checkpoint={GOLDEN / 'fla_path'}", *options])
