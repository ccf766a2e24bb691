"""LongBench on local data: `python -m path_jax.evaluation.longbench --checkpoint=DIR_OR_FILE --data=DIR`.

DIR has the JSON-lines files that LongBench publishes (narrativeqa.jsonl, ..., trec_e.jsonl), whose rows have the fields
input, context, answers, length, dataset and all_classes. Every row becomes a prompt, of which the middle is left out
where it is longer than the model reads, and is answered greedily. A row's score in [0, 100] is that of its best answer.

The prompts are our own; numbers to be compared with published ones need LongBench's, as --prompts=dataset2prompt.json.
Differences that remain: Chinese texts are compared by character, not by the words of a segmenter; ROUGE-L is over whole
texts, and code similarity by difflib; chat templates are not applied.
"""

import argparse
import collections
import dataclasses
import difflib
import json
import re
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from path_jax import report
from path_jax.evaluation.text_model import TextModel
from path_jax.models.config import DTYPES

_LENGTHS = {"0-4k": 4000, "4-8k": 8000, "8k+": float("inf")}  # words, the groups of the files *_e.jsonl
_FIELDS = ("input", "context", "answers")


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """2 P R / (P + R), where P and R count common tokens with their multiplicity."""
    common = (collections.Counter(found) & collections.Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _without(text: str, is_dropped: Callable[[str], bool]) -> str:
    return "".join(character for character in text.lower() if not is_dropped(character))


def _is_chinese_mark(character: str) -> bool:
    return character in string.punctuation or not (character.isalnum() or character.isspace())


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles, as SQuAD compares them."""
    return [word for word in _without(text, string.punctuation.__contains__).split() if word not in ("a", "an", "the")]


def token_f1(prediction: str, answer: str, _) -> float:
    """F1 of words."""
    return _f1(_words(prediction), _words(answer))


def character_f1(prediction: str, answer: str, _) -> float:
    """F1 of characters, without punctuation and spaces."""
    return _f1(*("".join(_without(text, _is_chinese_mark).split()) for text in (prediction, answer)))


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        previous = row
        row = [0]
        for j, y in enumerate(b):
            row.append(previous[j] + 1 if x == y else max(previous[j + 1], row[j]))
    return row[-1]


def _rouge(found: Sequence[str], wanted: Sequence[str]) -> float:
    common = _longest_common_subsequence(found, wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def rouge_l(prediction: str, answer: str, _) -> float:
    """F1 of the longest common subsequence of words."""
    return _rouge(prediction.split(), answer.split())


def character_rouge_l(prediction: str, answer: str, _) -> float:
    """F1 of the longest common subsequence of characters."""
    return _rouge("".join(prediction.split()), "".join(answer.split()))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / n where the answer is one of n classes that the prediction names, else 0; parts of its name do not count."""
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def number_share(prediction: str, answer: str, _) -> float:
    """Share of the prediction's numbers that are the answer's."""
    numbers, wanted = re.findall(r"\d+", prediction), re.findall(r"\d+", answer)
    return numbers.count(wanted[0]) / len(numbers) if numbers and wanted else 0.0


def code_similarity(prediction: str, answer: str, _) -> float:
    """Similarity (twice the matching characters over all) of the prediction's first line that is code."""
    is_code = lambda line: line.strip() and not any(mark in line for mark in ("`", "#", "//"))
    line = next(filter(is_code, prediction.split("\n")), "")
    return difflib.SequenceMatcher(None, line, answer, autojunk=False).ratio()


@dataclasses.dataclass(frozen=True)
class Task:
    """What belongs to a dataset.

    Attributes:
      prompt: Text with {context} and {input}.
      metric: (prediction, answer, classes) -> score in [0, 1].
      max_new_tokens: Of an answer.
      is_one_line: Only the first line of an answer counts; the prompt ends in examples, which models go on with.
    """

    prompt: str
    metric: Callable[[str, str, Sequence[str]], float]
    max_new_tokens: int
    is_one_line: bool = False


_READ = "Read the text and answer the question about it in as few words as possible.\n\nText:\n{context}\n\n"
_ASK = "Question: {input}\nShort answer:"
_PASSAGES = "The answer to a question is spread over the following passages.\n\n{context}\n\nAnswer in a few words.\n"
_SUMMARY = "Text:\n{context}\n\nWrite a summary of the text above, about one page long.\n\nSummary:"
_CHINESE = "请阅读下面的材料，并简短回答问题。\n\n{context}\n\n问题：{input}\n简短回答："
_EXAMPLES = "{context}\n{input}"
_PAPER = 'If the paper does not tell, the answer is "unanswerable"; some answers are "yes" or "no".\n'
_CODE = "Continue this program by one line.\n\n{context}{input}"
TASKS = {
    "narrativeqa": Task(_READ + _ASK, token_f1, 128),
    "qasper": Task(_READ + _PAPER + _ASK, token_f1, 128),
    "multifieldqa_en": Task(_READ + _ASK, token_f1, 64),
    "multifieldqa_zh": Task(_CHINESE, character_f1, 64),
    "hotpotqa": Task(_PASSAGES + _ASK, token_f1, 32),
    "2wikimqa": Task(_PASSAGES + _ASK, token_f1, 32),
    "musique": Task(_PASSAGES + _ASK, token_f1, 32),
    "dureader": Task(_CHINESE, character_rouge_l, 128),
    "gov_report": Task(_SUMMARY, rouge_l, 512),
    "qmsum": Task("Minutes of a meeting:\n{context}\n\nRequest: {input}\nReply in a few sentences:", rouge_l, 512),
    "multi_news": Task(_SUMMARY, rouge_l, 512),
    "vcsum": Task("会议记录：\n{context}\n\n请概括上述会议的主要内容。\n\n概括：", character_rouge_l, 512),
    "trec": Task("Every question is followed by its type.\n\n" + _EXAMPLES, classification, 64, is_one_line=True),
    "triviaqa": Task("Answer from the passage in a few words.\n\n" + _EXAMPLES, token_f1, 32, is_one_line=True),
    "samsum": Task("Every dialogue is followed by a summary.\n\n" + _EXAMPLES, rouge_l, 128, is_one_line=True),
    "lsht": Task("每条新闻之后是它的类别。\n\n" + _EXAMPLES, classification, 64, is_one_line=True),
    "passage_count": Task(
        "{context}\n\nSome paragraphs above are repeated. Number of different ones:", number_share, 32
    ),
    "passage_retrieval_en": Task(
        '{context}\n\nSummary of one paragraph:\n{input}\n\nName that paragraph, as in "Paragraph 1".\nIt is:',
        number_share,
        32,
    ),
    "passage_retrieval_zh": Task(
        "{context}\n\n其中一段的概要：\n{input}\n\n这是哪一段？请按“段落1”的格式回答。\n回答：", number_share, 32
    ),
    "lcc": Task(_CODE, code_similarity, 64),
    "repobench-p": Task(_CODE, code_similarity, 64),
}


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Returns the first rows of one file.

    Raises:
      ValueError: for a row that is not one of LongBench, or a file without rows.
    """
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(rows) >= limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not all(isinstance(row[name], str) for name in ("input", "context")) or not row["answers"]:
                    raise ValueError("input and context must be text, and answers a list")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is not a row with {', '.join(_FIELDS)}: {error}") from error
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def without_middle(tokens: Sequence[int], length: int) -> list[int]:
    """Returns the first and the last tokens, half of `length` each, or all if they are no more than `length`."""
    first = length // 2
    return list(tokens) if len(tokens) <= length else [*tokens[:first], *tokens[len(tokens) - (length - first) :]]


def prompt_text(template: str, row: Mapping[str, Any]) -> str:
    """Returns the prompt of a row.

    Raises:
      ValueError: if the template names a field that the row does not have.
    """
    try:
        return template.format(**row)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"the prompt {template[:60]!r}... does not fit a row: {error!r}") from error


def score_of(task: Task, prediction: str, row: Mapping[str, Any]) -> float:
    """Returns the best score over the answers of a row, in [0, 100]."""
    if task.is_one_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    classes = row.get("all_classes") or ()
    return 100 * max(task.metric(prediction, answer, classes) for answer in row["answers"])


def evaluate(
    model: TextModel, task: Task, rows: Sequence[Mapping[str, Any]], on_progress: Callable[[int], Any] = lambda n: None
) -> tuple[list[str], list[float]]:
    """Returns the predictions and scores of rows of one dataset."""
    room = model.max_length - task.max_new_tokens
    if room < 2:
        raise ValueError(f"max_length={model.max_length} leaves no room beside {task.max_new_tokens} new tokens")
    prompts = [without_middle(model.encode(prompt_text(task.prompt, row)), room) for row in rows]
    predictions = model.complete(prompts, task.max_new_tokens, on_progress=on_progress)
    return predictions, [score_of(task, prediction, row) for prediction, row in zip(predictions, rows)]


def summary(scores: Sequence[float], rows: Sequence[Mapping[str, Any]], by_length: bool) -> dict[str, float]:
    """Returns the mean score and the number of rows; with `by_length`, the means of the groups by length that occur."""
    result = {"score": sum(scores) / len(scores), "rows": len(scores)}
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for score, row in zip(scores, rows):
        groups[next(name for name, end in _LENGTHS.items() if row.get("length", 0) < end)].append(score)
    means = {name: sum(groups[name]) / len(groups[name]) for name in _LENGTHS if name in groups}
    return result | means if by_length else result


def _tasks(args: argparse.Namespace) -> dict[Path, Task]:
    """The files to evaluate, with what belongs to them."""
    if not args.data.is_dir():
        raise ValueError(f"--data={args.data} is not a directory")
    prompts = json.loads(args.prompts.read_text(encoding="utf-8")) if args.prompts else {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ValueError(f"--prompts={args.prompts} must be JSON: {{dataset: prompt}}")
    names = args.datasets.split(",") if args.datasets else None
    paths = [args.data / f"{name}.jsonl" for name in names] if names else sorted(args.data.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"--data={args.data} has no .jsonl files")
    tasks = {}
    for path in paths:
        name = path.stem.removesuffix("_e")
        if name not in TASKS:
            raise ValueError(f"{path.stem} is not a dataset of LongBench; choose from {', '.join(TASKS)}")
        tasks[path] = dataclasses.replace(TASKS[name], prompt=prompts.get(name, TASKS[name].prompt))
    return tasks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m path_jax.evaluation.longbench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="run or published directory, or .gguf file")
    add("--data", type=Path, required=True, help="directory of LongBench's .jsonl files")
    add("--datasets", help="names, with commas between (default: every file)")
    add("--prompts", type=Path, help="JSON file {dataset: text with {context} and {input}} (default: our own)")
    add("--max-length", type=int, help="tokens of a prompt with its answer (default: what the checkpoint states)")
    add("--batch-size", type=int, default=4, help="prompts read together (default: %(default)s)")
    add("--limit", type=int, help="rows per dataset (default: all)")
    add("--dtype", choices=DTYPES, help="of parameters, computation and cache (default: float32)")
    add("--output", type=Path, default=Path("longbench.json"), help="JSON file (default: %(default)s)")
    add("--predictions", type=Path, help="JSON-lines file for the answers of the model")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates as the parsed arguments say, and writes and returns the results."""
    tasks = _tasks(args)
    if args.output.is_dir():
        raise ValueError(f"--output={args.output} is a directory; name a file")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit={args.limit} must be at least 1")
    data = {path: read_rows(path, args.limit) for path in tasks}
    model = TextModel.load(args.checkpoint, args.dtype, max_length=args.max_length, batch_size=args.batch_size)
    results, lines = {}, []
    with Progress(console=Console(stderr=True)) as progress:
        for path, task in tasks.items():
            bar = progress.add_task(path.stem, total=len(data[path]))
            predictions, scores = evaluate(model, task, data[path], lambda n, bar=bar: progress.advance(bar, n))
            metric = {"metric": task.metric.__name__}
            results[path.stem] = metric | summary(scores, data[path], by_length=path.stem.endswith("_e"))
            for row, prediction, score in zip(data[path], predictions, scores):
                line = dict(dataset=path.stem, prediction=prediction, answers=row["answers"], score=score)
                lines.append(json.dumps(line, ensure_ascii=False))
    average = sum(result["score"] for result in results.values()) / len(results)
    found = dict(average=average, results=results, checkpoint=str(args.checkpoint), max_length=model.max_length)
    for path, text in ((args.output, json.dumps(found, indent=2)), (args.predictions, "\n".join(lines))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            report.write_file(path, (text + "\n").encode())
    return found


def results_table(found: Mapping[str, Any]) -> Table:
    """Returns the scores as a table."""
    table = Table("dataset", "metric", "rows", "score", *_LENGTHS)
    for name, result in found["results"].items():
        numbers = [report.format_value(result[key]) if key in result else "" for key in ("rows", "score", *_LENGTHS)]
        table.add_row(name, result["metric"], *numbers)
    table.add_row("average", "", "", report.format_value(found["average"]), *("" for _ in _LENGTHS))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line and exits with status 1 for input that cannot work."""
    args = _parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax warns about metadata that parameters alone do not have
    try:
        found = run(args)
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
        sys.exit(f"longbench: {error}")
    Console().print(results_table(found))


if __name__ == "__main__":
    main()
