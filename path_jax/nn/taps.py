"""Named hook points.

A Tap is a parameter-free identity submodule. It adds nothing to the checkpoint; capture its value with flax's
`capture_intermediates`, replace it with `nn.intercept_methods` (entered inside the traced function).
"""

import flax.linen as nn

# In every block, then inside mixers (each mixer has those that apply). `recurrence` is what a recurrence gives for each
# token and `head_out` what each head of an attention gives, before norm, gate and output projection; `gate` is what the
# output is multiplied with. Attention weights, `attn_probs`, are there where the option `expose_weights` is set.
BLOCK_TAPS = ("resid_pre", "mixer_in", "mixer_out", "mlp_in", "mlp_out", "resid_post")
MIXER_TAPS = (
    "q", "k", "v", "w", "beta", "log_forget", "conv_out", "attn_probs", "head_out", "recurrence", "gate",
)  # fmt: skip


class Tap(nn.Module):
    """Returns its argument; its module name, one of BLOCK_TAPS or MIXER_TAPS, says what the value is."""

    def __post_init__(self):
        if self.name not in (None, *BLOCK_TAPS, *MIXER_TAPS):
            raise ValueError(f"unknown tap {self.name!r}; choose from {BLOCK_TAPS + MIXER_TAPS}")
        super().__post_init__()

    def __call__(self, x):
        return x


def is_tap(module: nn.Module, method_name: str) -> bool:
    """Filter for `capture_intermediates`: the outputs of taps only."""
    return isinstance(module, Tap) and method_name == "__call__"
