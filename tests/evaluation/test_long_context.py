"""Questions about long texts: who answers them right, who does not, and what a tiny model gets."""

import jax
import numpy as np
import pytest

from path_jax.data import ByteTokenizer, Corpus, Document, vocabulary_tokenizer
from path_jax.evaluation import long_context
from path_jax.evaluation.long_context import is_answered
from path_jax.evaluation.runner import EVALUATORS, make_evaluators
from path_jax.evaluation.text_codec import TextCodec
from path_jax.models import DecoderLM, ModelConfig

SHAPE = dict(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, mixer="rope")
NAMES = ("needle", "ruler", "babilong", "phonebook")
TEXT = "\n".join(f"Line {i} of the text is as good as any other." for i in range(300))
CORPUS = Corpus((), (Document("a", np.append(256, ByteTokenizer().encode(TEXT)).astype(np.int32)),), 257)


class Stub:
    """Knows the answers, and gives them or others."""

    def __init__(self, model, params, *, batch_size, max_length, chunk):
        self._is_right, self._answers, self._decode = params
        self._max_length = max_length

    def read(self, prompts):
        assert max(map(len, prompts)) < self._max_length
        return [self._answers[tuple(prompt.tolist())] for prompt in prompts]

    def score(self, prefix, answers):
        assert all(np.array_equal(x, y) for x, y in zip(prefix, answers))
        return [(np.full(len(x), 0.5), np.full(len(x), self._is_right)) for x in answers]

    def generate(self, prefix, num_new):
        end = np.array([10, *b"and so on"], np.int32)
        text = np.zeros((len(prefix), num_new), np.int32)
        for row, answer in zip(text, prefix):
            answer = np.append(answer, end) if self._is_right else np.append(answer[::-1], end)
            row[: len(answer)] = answer[:num_new]
        return text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_right", [True, False])
@pytest.mark.parametrize("standard", [0, 1])
def test_right_answers_score_one_and_others_none(name, is_right, standard, monkeypatch):
    monkeypatch.setattr(long_context, "Reader", Stub)
    model = DecoderLM(ModelConfig(vocab_size=257, **SHAPE))
    options = {name: {"max_length": 1400, "num_depths": 3, "standard": standard}}
    evaluator = make_evaluators(options, model, CORPUS, 700)[name]
    answers = {tuple(item.prompt.tolist()): item.target for item in evaluator.questions}
    result = evaluator((is_right, answers, None))
    assert {int(key.split("/")[2]) for key in result if key.startswith("loss/")} == {700, 1400}
    for key, value in result.items():
        assert value == (0.5 if key.startswith("loss/") else float(is_right)), key
    if name in ("needle", "phonebook"):
        keys = [f"{name}/{n}{end}" for n in (700, 1400) for end in ("/0.00", "/0.50", "/1.00", "")]
        assert list(result)[:8] == keys


def test_a_tiny_model_answers_something():
    model = DecoderLM(ModelConfig(vocab_size=257, **SHAPE))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    section = {name: {"max_length": 512, "num_depths": 2, "samples": 1, "batch_size": 4} for name in NAMES}
    for name, evaluator in make_evaluators(section, model, CORPUS, 512).items():
        result = evaluator(params)
        losses = [value for key, value in result.items() if key.startswith("loss/")]
        assert len(losses) == len(EVALUATORS[name].tasks) and np.allclose(losses, np.log(257), atol=0.5)
        assert all(0 <= value <= 1 for key, value in result.items() if not key.startswith("loss/"))


def test_lengths_stay_within_what_the_model_reads():
    section = {"needle": {"num_depths": 1, "samples": 1}}
    learned = ModelConfig(vocab_size=257, **SHAPE | {"mixer": "nope"}, num_positions=512)
    (evaluator,) = make_evaluators(section, DecoderLM(learned), CORPUS, 512).values()
    assert {item.sample.length for item in evaluator.questions} == {448}
    (evaluator,) = make_evaluators(section, DecoderLM(ModelConfig(vocab_size=257, **SHAPE)), CORPUS, 256).values()
    assert {item.sample.length for item in evaluator.questions} == {256, 512, 1024}
    assert all(len(item.prompt) <= item.sample.length for item in evaluator.questions)


def test_a_learned_vocabulary_of_its_own():
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = vocabulary_tokenizer(
        model="gpt2", pre="llama-bpe", tokens=[*alphabet, "<s>", "is"], types=[1] * 256 + [3, 1], merges=["i s"],
        scores=None, add_bos=True, bos_id=256, add_space_prefix=None,
    )  # fmt: skip
    codec = TextCodec.of(tokenizer, 258)
    assert codec.encode("is")[0] == 256 and codec.encode("is").shape == (2,)
    assert codec.decode(codec.encode("is it")) == "is it"
    assert TextCodec.of(tokenizer, 258, bos_id=3).encode("is").tolist() == [3, 257]
    model = DecoderLM(ModelConfig(vocab_size=258, **SHAPE))
    corpus = Corpus((), (Document("a", codec.encode(TEXT)),), 258)
    with pytest.raises(ValueError, match="needs the tokenizer of this model with 258 ids"):
        make_evaluators({"needle": {}}, model, corpus, 256)
    (evaluator,) = make_evaluators({"needle": {}}, model, corpus, 256, codec=codec).values()
    for item in evaluator.questions:
        assert item.prompt[0] == 256 and len(item.prompt) <= item.sample.length
        assert codec.decode(item.prompt) == item.sample.prompt
        assert codec.decode(item.target) == item.sample.target


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        ("It is 4839201.", "4839201", True),
        ("It is 4,839,201", "4839201", True),
        ("14839201", "4839201", False),
        ("4839201,4839202", "4839202", True),
        ("Call (247) 555-1234!", "555-1234", True),
        ("In the KITCHEN, I think", "kitchen", True),
        ("kitchenette", "kitchen", False),
        ("", "kitchen", False),
    ],
)
def test_answers_are_whole_words(text, answer, expected):
    assert is_answered(text, answer) == expected


@pytest.mark.parametrize("option", ["train_length", "multiple", "max_length", "num_depths", "samples", "batch_size"])
def test_bad_options(option):
    model = DecoderLM(ModelConfig(vocab_size=257, **SHAPE))
    with pytest.raises(ValueError, match=f"evaluator needle: {option}=0"):
        make_evaluators({"needle": {option: 0}}, model, CORPUS, 256)
