"""Continuing token sequences where a token may leave the model after a layer that is deep enough for it.

The layers are cut into segments at the exits. After each segment an exit rule sees the residual stream; a token that
leaves gets its logits from there, `unembed(final_norm(x))`, and layers behind see it later or not at all:

* missing="recompute": the streams of tokens that left wait at their exit. The next token that goes deeper takes them
  along in one chunk, so every cache holds what full depth would have put there, and a step that goes deep reads the
  parameters once for all of them. Only the tokens' own logits are those of an exit.
* missing="propagate": layers behind the exit put the stream of the exit into their caches at once, without attention
  or MLP (Elbayad et al., "Depth-adaptive Transformer", 2020, arXiv 1910.10073). Later tokens see approximations.

A single row goes on from token to token on the device, unless somebody wants to see each of them; for batches see
`exit_stack`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from path_jax.models.cache import init_cache, unrolled
from path_jax.models.decoder_lm import DecoderLM
from path_jax.models.exit_stack import ExitStack
from path_jax.models.generate import append_rows, check_prompt, prefill
from path_jax.models.sampling import check_sampling

# rule(exit, x, before, lens) -> is_done [R]: whether tokens may leave at exit number `exit` (an int32 scalar) with the
# residual stream x [R, D], which the last layer made of `before` [R, D]; lens(x) gives logits [R, V]. A pytree with
# __call__, so that its numbers are arguments of compiled programs.
ExitRule = Callable[[Array, Array, Array, Callable[[Array], Array]], Array]

MISSING = ("recompute", "propagate")


class Monitor(Protocol):
    """Compares some tokens that leave with what full depth says."""

    @property
    def is_tripped(self) -> bool:
        """Whether no token may leave any more."""

    def choose(self, num: int) -> Bool[np.ndarray, "num"]:
        """Which of the next `num` tokens that leave go on to full depth for a comparison."""

    def foresee(self, num: int) -> Bool[np.ndarray, "num"]:
        """What `choose` will say of the next `num` tokens that leave."""

    def observe(self, agreed: Bool[np.ndarray, "n"]) -> None:
        """Whether the likeliest tokens of exit and full depth were the same."""


class EarlyExitOutput(NamedTuple):
    """What `generate_with_exits` returns."""

    tokens: Int[np.ndarray, "B S"]  # as of `generate`
    depths: Int[np.ndarray, "B M"]  # layers below each new token's logits; 0 behind the end of a row
    num_steps: int  # passes after the prompt
    num_layer_runs: int  # layers run in those passes, each once for all rows and chunks; L * num_steps at full depth


def generate_with_exits(
    model: DecoderLM,
    params: Mapping[str, Any],
    prompt: Int[Array, "T"] | Int[Array, "B T"] | Sequence[Sequence[int]],
    *,
    rule: ExitRule,
    exit_layers: Sequence[int],
    max_new_tokens: int,
    missing: str = "recompute",
    max_waiting: int = 7,
    min_margin: float = 0.0,
    monitor: Monitor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | None = None,
    stop_token: int | Sequence[int] | None = None,
    on_token: Callable[[Int[np.ndarray, "B"], Bool[np.ndarray, "B"]], Any] | None = None,
    cache_dtype=None,
) -> EarlyExitOutput:
    """Continues every row of `prompt` by `max_new_tokens` tokens, most of them from fewer than all layers.

    The prompt and the first new token take all layers. A rule that never fires gives the tokens of `generate`.

    Args:
      model, params, prompt, max_new_tokens, temperature, top_k, top_p, rng, stop_token, on_token, cache_dtype: see
        `generate`.
      rule: see `ExitRule`; those of `path_jax.interpretability.exit_rules` for example.
      exit_layers: layers after which a token may leave, ascending, of 0 ... L - 2.
      missing: what layers behind an exit learn of a token, see the module's text.
      max_waiting: with "recompute", tokens of a row that may wait before one has to go through all layers.
      min_margin: a token whose two likeliest ones are closer in probability than this at its exit goes on to full
        depth.
      monitor: see `Monitor`; a chosen token goes on to full depth too.

    Raises:
      ValueError: for an argument out of range.
    """
    tokens, lengths = check_prompt(prompt, model.config.vocab_size, max_new_tokens)
    sampling = check_sampling(model.config.vocab_size, temperature, top_k, top_p, rng, stop_token)
    if missing not in MISSING:
        raise ValueError(f"{missing=} is unknown; choose from {', '.join(MISSING)}")
    if max_waiting < 1:
        raise ValueError(f"{max_waiting=} must be at least 1")
    if not 0 <= min_margin <= 1:
        raise ValueError(f"{min_margin=} must be in [0, 1]")
    config, params = unrolled(model.config, params)
    exit_layers = [int(layer) for layer in exit_layers]
    if exit_layers != sorted(set(exit_layers)) or not all(0 <= layer < config.num_layers - 1 for layer in exit_layers):
        raise ValueError(f"{exit_layers=} must ascend within 0 ... {config.num_layers - 2}, all layers but the last")
    rng = jax.random.key(0) if rng is None else rng

    model, batch = DecoderLM(config), len(tokens)
    cache = init_cache(config, batch, tokens.shape[1] + max_new_tokens, dtype=cache_dtype or config.dtype)
    first = prefill(model, sampling, max_new_tokens, params, tokens, lengths, cache, rng)
    max_waiting = max_waiting if missing == "recompute" else None
    stack = ExitStack(model, sampling, params, rule, exit_layers, first.cache, max_waiting, rng)

    new = np.full((batch, max_new_tokens), sampling.fill, np.int32)
    depths = np.zeros((batch, max_new_tokens), np.int32)
    is_running = np.ones(batch, bool)
    token, is_stop = np.asarray(first.new[:, 0]), np.asarray(first.is_stopped)
    depth = np.full(batch, config.num_layers)
    step = num_steps = 0
    while step < max_new_tokens and is_running.any():
        if step:
            is_tripped = monitor is not None and monitor.is_tripped
            if batch == 1 and on_token is None:
                checks = np.zeros(max_new_tokens, bool) if monitor is None else monitor.foresee(max_new_tokens)
                passed, passed_depths, newest = stack.walk(
                    token, step, max_new_tokens - step, is_tripped, checks, min_margin
                )
                behind = slice(step, step + len(passed) - 1)
                new[0, behind], depths[0, behind] = passed[:-1], passed_depths[:-1]
                if monitor is not None:
                    monitor.choose(int((passed_depths[:-1] < config.num_layers).sum()))
                num_steps += len(passed)
                step += len(passed) - 1
            else:
                stack.push(token, is_running)
                newest = stack.advance(is_running, stack.is_full | is_tripped, step)
                num_steps += 1
            is_early = is_running & (stack.depth < config.num_layers)
            is_checked = np.zeros(batch, bool)
            if monitor is not None:
                is_checked[is_early] = monitor.choose(int(is_early.sum()))
            going_on = is_early & (is_checked | (newest.margin < min_margin))
            if going_on.any():
                best, newest = newest.best, stack.advance(going_on, going_on, step)
                if is_checked.any():
                    monitor.observe((best == newest.best)[is_checked])
            token, is_stop, depth = newest.token, newest.is_stop, stack.depth
            if missing == "propagate":
                stack.store(is_running)
        new[is_running, step] = token[is_running]
        depths[is_running, step] = depth[is_running]
        is_running = is_running & ~is_stop
        step += 1
        if on_token is not None and on_token(new[:, step - 1].copy(), is_running):
            break
    tokens = append_rows(tokens, lengths, new, max_new_tokens, sampling.fill)
    return EarlyExitOutput(tokens, depths, num_steps, stack.num_layer_runs)
