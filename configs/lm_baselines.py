"""FoX, RoPE and NoPE language models at the sizes of lm_path.py.

    python train.py --config=configs/lm_baselines.py:size=760m,mixer=fox_pro --workdir=runs/fox_pro_760m \
        --config.data.path=/data/longcrawl64_tokens

Argument: size = debug | quickstart | 125m | 360m | 760m, mixer = fox | fox_pro | rope | rope_pro | nope.

quickstart trains the baseline on the same bytes with the same recipe as lm_path.py's quickstart, for comparison. It
fits on cpu:1 (`path_jax.plan`).

The sizes from 125m on follow Lin et al., "Forgetting Transformer" (arXiv 2503.02130) and its published configurations:
sequences of 16384 tokens, 32 in a batch, AdamW (0.9, 0.95), weight decay 0.1, clipping at 1, warm-up over 256 Mi
tokens, cosine to 0, GPT-2's vocabulary of 50257; 2.7, 7.5 and 48.3 billion tokens. Peak learning rates there are 2e-3
(FoX Pro), 1e-3 (FoX LLaMA, Transformer Pro, 760m) and 5e-4 (Transformer LLaMA, 760m); NoPE and the smaller LLaMA blocks
take the 760m values. Transformer Pro and LLaMA have half the heads, of twice the size, and rotary base 5e5. Pro blocks
add key and value shift, QK norm, output norm and output gate, with a narrower MLP (3.5 instead of 4 times the width).
"""

import ml_collections

from configs import common, lm_path

_TOKENS = {"125m": 2_684_354_560, "360m": 7_516_192_768, "760m": 48_318_382_080}
_PRO = dict(kv_shift=True, qk_norm="shared", output_norm=True, output_gate=True)
# argument: (mixer, its options, peak learning rate)
_MIXERS = {
    "fox": ("fox", {}, 1e-3),
    "fox_pro": ("fox", _PRO, 2e-3),
    "rope": ("rope", dict(rope_theta=5e5), 5e-4),
    "rope_pro": ("rope", _PRO | dict(rope_theta=5e5), 1e-3),
    "nope": ("nope", {}, 5e-4),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Configuration for `size=...,mixer=...`."""
    values = common.parse_arg(arg, size="quickstart", mixer="fox")
    size, (mixer, options, lr) = values["size"], common.choose("mixer", values["mixer"], _MIXERS)
    if size in ("debug", "quickstart"):
        config = lm_path.get_config(f"size={size}")
        config.model.update(mixer=mixer, mixer_options=options)
        return config
    common.choose("size", size, _TOKENS)
    config = lm_path.get_config(f"size={size}")
    config.model.update(vocab_size=50257, mixer=mixer, mixer_options=options)
    if mixer == "rope":
        config.model.num_heads //= 2
    if "kv_shift" in options:
        config.model.mlp_dim = -(-7 * config.model.embed_dim // 3 // 256) * 256
    config.data.update(sequence_length=16384, batch_size=32, bos_id=50256, vocab_size=50257)
    config.optim.update(lr=lr, init_lr=0.0, end_lr=0.0, weight_decay=0.1)
    common.token_budget(config, _TOKENS[size], 256 * 2**20)
    return config
