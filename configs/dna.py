"""PaTH-FoX beside RoPE on DNA: motifs that move and turn round, and language models of FASTA files.

    python train.py --config=configs/dna.py:mixer=path_fox,size=debug --workdir=runs/motif_path_fox
    python -m path_jax.sweep --config=configs/dna.py --vary mixer=path_fox,rope --vary seed=0,1,2 \
        --select lr=1e-3,3e-3 --output=runs/motif
    python train.py --config=configs/dna.py:task=fasta,mixer=rope --config.data.path=genome.fa --workdir=runs/genome

Argument: task = motif | fasta, size = small | debug, mixer = path_fox | rope, alphabet = dna | protein (of FASTA), lr,
seed, steps.

motif: `path_jax.data.motif`, a row of events at loci; the letters that answer a question are learned and scored.
Trained at one length, evaluated there and at two and four times it, by the number of changes that the motif went
through. fasta: next letters of every record, one token each; a twentieth of the records is held out, or the end of a
single one. The two mixers have the same number of parameters: RoPE, without reflections and gates, has a wider MLP. The
settings are ours. `debug` takes seconds on a CPU and learns little; `small` takes minutes.

The default fits on cpu:1 (`path_jax.plan`).
"""

from configs import common

# model, row length, steps, batch, scored positions or tokens
_SIZES = {"small": ((2, 64, 2), 128, 1500, 32, 50_000), "debug": ((1, 32, 2), 64, 20, 16, 300)}
_MLP_DIMS = {"path_fox": {64: 256, 32: 128}, "rope": {64: 280, 32: 152}}
_VOCAB_SIZES = {"dna": 6, "protein": 27}
_NUM_LOCI = 5


def get_config(arg: str | None = None):
    """Configuration for `task=...,size=...,mixer=...,alphabet=...,lr=...,seed=...,steps=...`."""
    values = common.parse_arg(
        arg, task="motif", size="small", mixer="path_fox", alphabet="dna", lr="3e-3", seed="0", steps=""
    )
    task, mixer, alphabet = values["task"], values["mixer"], values["alphabet"]
    common.choose("task", task, dict.fromkeys(("motif", "fasta")))
    mlp_dims = common.choose("mixer", mixer, _MLP_DIMS)
    size, length, num_steps, batch_size, num_scored = common.choose("size", values["size"], _SIZES)
    config = common.task_config(
        "motif", dict(num_loci=_NUM_LOCI), vocab_size=9 + _NUM_LOCI, length=length, size=size, mixer=mixer,
        lr=float(values["lr"]), seed=int(values["seed"]), num_steps=int(values["steps"] or num_steps),
        batch_size=batch_size, num_scored=num_scored,
    )  # fmt: skip
    config.model.mlp_dim = mlp_dims[config.model.embed_dim]
    if task == "fasta":
        config.model.vocab_size = common.choose("alphabet", alphabet, _VOCAB_SIZES)
        data = dict(source="fasta", path="", alphabet=alphabet, sequence_length=length, batch_size=batch_size)
        config.data = type(config)(data | dict(heldout_fraction=0.05, seed=int(values["seed"])))
        config.evals = type(config)(dict(perplexity=dict(max_tokens=num_scored), length=dict()))
    return config
