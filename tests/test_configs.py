"""Every configuration builds at every size, and its debug variant trains."""

import math

import pytest

from configs import common, dna, flip_flop, group_words, lm_baselines, lm_path, recall, tracking
from path_jax.data import ByteTokenizer, DataConfig
from path_jax.data.prepare import prepare
from path_jax.data.source_files import Encoding, list_files
from path_jax.evaluation.pretrained import codec_of_run
from path_jax.evaluation.task_accuracy import TaskAccuracy
from path_jax.mixers import MIXERS
from path_jax.models import ModelConfig
from path_jax.models.decoder_lm import count_parameters
from path_jax.run import train_and_report
from path_jax.training import loop
from path_jax.training.experiment import TrainConfig, make_experiment
from path_jax.training.optim import OptimConfig, make_schedule

VARIANTS = [(lm_path, mixer) for mixer in ("path_fox", "path")] + [
    (lm_baselines, mixer) for mixer in ("fox", "fox_pro", "rope", "rope_pro", "nope")
]
IDS = [mixer for _, mixer in VARIANTS]


@pytest.mark.parametrize(
    "module, mixer",
    # The others have tests of their mixers, and path_fox is what test_train_eval.py trains.
    [pytest.param(*v, id=v[1], marks=[] if v[1] == "rope" else pytest.mark.slow) for v in VARIANTS],
)
def test_debug_variant_trains_two_steps(module, mixer, tmp_path):
    config = module.get_config(f"size=debug,mixer={mixer}")
    config.train.num_steps = 2
    result = loop.run(make_experiment(config.to_dict()), tmp_path)
    assert [record["step"] for record in result.records] == [1, 2]
    assert all(math.isfinite(record["loss"]) and 4 < record["loss"] < 7 for record in result.records)


@pytest.mark.parametrize("module, mixer", VARIANTS, ids=IDS)
@pytest.mark.parametrize("size", [size for size in common.SIZES if size not in ("1b", "7b")])
def test_sections_fit_their_dataclasses(module, mixer, size):
    config = module.get_config(f"size={size},mixer={mixer}")
    data = config.data.to_dict()
    if not data["path"] and data["source"] != "stdlib":
        data["path"] = "somewhere"
    DataConfig(**data)
    train = TrainConfig(**config.train)
    make_schedule(OptimConfig(**config.optim), train.num_steps)
    ModelConfig(**config.model.to_dict())


def test_sizes_have_the_parameters_their_names_say():
    for size, expected in (("125m", 125e6), ("360m", 360e6), ("760m", 760e6)):
        for module, mixer in ((lm_path, "path_fox"), (lm_baselines, "fox_pro")):
            config = ModelConfig(**module.get_config(f"size={size},mixer={mixer}").model.to_dict())
            # The names count the matrices of the layers and one of the two vocabulary matrices.
            counted = count_parameters(config) - config.vocab_size * config.embed_dim
            assert 0.85 * expected < counted < 1.25 * expected, (size, mixer, counted)


def test_bad_arguments_name_the_choices():
    with pytest.raises(ValueError, match="size=huge is unknown; choose from debug"):
        lm_path.get_config("size=huge")
    with pytest.raises(ValueError, match="'depth=3' is not one of"):
        lm_path.get_config("depth=3")
    with pytest.raises(ValueError, match="mixer=mamba is unknown"):
        lm_baselines.get_config("mixer=mamba")


@pytest.mark.parametrize(
    "module, arguments, sizes",
    [
        (flip_flop, "", ("cpu", "paper")),
        (group_words, "", ("cpu", "paper")),
        (group_words, "group=a5", ("paper",)),
        (group_words, "group=z7,generators=2,layers=2", ("cpu",)),
        (recall, "back=2", ("cpu", "paper")),
        (recall, "task=ar,mixer=based", ("small", "cpu", "paper")),
        (recall, "task=ar,mixer=mamba+rope,layers=3", ("cpu",)),
        (recall, "task=atr,mixer=mamba,conv_size=2", ("small", "cpu", "paper")),
        (tracking, "task=code_variables", ("cpu",)),
        (tracking, "task=boxes", ("cpu",)),
        (dna, "mixer=rope", ("small",)),
    ],
)
def test_task_configurations_fit_their_tasks(module, arguments, sizes):
    for size in (*sizes, "debug"):
        config = module.get_config(f"size={size},{arguments}")
        experiment = make_experiment(config.to_dict())
        assert experiment.corpus.vocab_size == experiment.model.config.vocab_size
        options = config.evals.task.to_dict()
        TaskAccuracy(experiment.model, experiment.corpus.heldout, **options)


def test_attention_mixers_that_track_have_the_same_number_of_parameters():
    count = lambda mixer: count_parameters(ModelConfig(**tracking.get_config(f"mixer={mixer}").model.to_dict()))
    expected = count("path_fox")
    for mixer in ("path", "fox", "rope", "nope", "stick_breaking"):
        assert abs(count(mixer) / expected - 1) < 0.002, mixer


def test_a_task_trains_two_steps(tmp_path):
    config = tracking.get_config("size=debug,mixer=nope")
    config.train.num_steps = 2
    result = loop.run(make_experiment(config.to_dict()), tmp_path)
    assert all(math.isfinite(record["loss"]) and 2 < record["loss"] < 4 for record in result.records)
    assert set(common.TASK_MIXERS) == set(MIXERS)


def test_mixers_that_read_dna_have_the_same_number_of_parameters():
    for size in ("small", "debug"):
        counts = [
            count_parameters(ModelConfig(**dna.get_config(f"size={size},mixer={mixer}").model.to_dict()))
            for mixer in ("path_fox", "rope")
        ]
        assert abs(counts[0] / counts[1] - 1) < 0.002, (size, counts)


def fasta_config(tmp_path):
    (tmp_path / "genome.fa").write_text(">a\n" + "ACGT" * 200 + "\n>b\n" + "GATTACA" * 60)
    config = dna.get_config("task=fasta,size=debug,mixer=rope")
    config.data.path = str(tmp_path / "genome.fa")
    config.train.num_steps = 2
    return config.to_dict()


def mixture_config(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 500)
    prepare(list_files([str(tmp_path / "a.txt")], None), Encoding("bytes", ByteTokenizer(), 256, 257), tmp_path / "p")
    config = lm_baselines.get_config("size=debug,mixer=rope")
    config.train.num_steps = 2
    parts = {
        "text": {"source": "files", "path": str(tmp_path / "a.txt"), "weight": 1},
        "prepared": {"source": "prepared", "path": str(tmp_path / "p"), "weight": 3},
    }
    config.data.update(source="mixture", parts=parts)
    return config.to_dict()


def test_runs_on_fasta_and_mixtures_know_their_vocabulary(tmp_path):
    """The parts of a mixture come through a configuration's sections."""
    config = fasta_config(tmp_path)
    codec = codec_of_run(config)
    assert codec.encode("acg").tolist() == [5, 0, 1, 2] and codec.decode([5, 0, 1]) == "AC"
    assert make_experiment(config).corpus.vocab_size == 6
    config = mixture_config(tmp_path)
    assert codec_of_run(config).encode("ab").tolist() == [256, 97, 98]
    assert make_experiment(config).corpus.train.weights == (3, 1)
    with pytest.raises(ValueError, match="alphabet=rna is unknown; choose from dna, protein"):
        dna.get_config("task=fasta,alphabet=rna")
    with pytest.raises(ValueError, match="task=genes is unknown"):
        dna.get_config("task=genes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, unit, low, high", [(fasta_config, "token", 1, 4), (mixture_config, "byte", 4, 12)], ids=["fasta", "mixture"]
)
def test_runs_on_fasta_and_mixtures_report_in_their_units(tmp_path, make, unit, low, high):
    summary = train_and_report(make(tmp_path), tmp_path / "run")
    assert low < summary[f"train_bits_per_{unit}"] < high and low < summary[f"heldout_bits_per_{unit}"] < high
