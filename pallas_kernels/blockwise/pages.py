"""Attention of a few queries to the closed superchunks of a decode cache, page by page, in plain XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

HIGHEST = jax.lax.Precision.HIGHEST


class Softmax(NamedTuple):
    """A softmax in progress over some of the keys; logits may be -inf."""

    maximum: Array  # [B, K, G, t]
    total: Array  # [B, K, G, t]
    out: Array  # [B, K, G, t, Hv]

    @classmethod
    def over_nothing(cls, rows: tuple[int, ...], v_head_dim: int, dtype):
        """No keys yet."""
        empty = jnp.zeros(rows, dtype)
        return cls(jnp.full(rows, -jnp.inf, dtype), empty, jnp.zeros((*rows, v_head_dim), dtype))

    def add(self, logits, v):
        """With further keys: logits [B, K, G, t, S], values [B, K, S, Hv]."""
        maximum = jnp.maximum(self.maximum, logits.max(-1))
        p = jnp.exp(logits - finite(maximum)[..., None])
        out = jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v, preferred_element_type=p.dtype)
        return self._plus(maximum, p.sum(-1), out)

    def merge(self, out, lse):
        """With keys whose normalised output and log-sum-exp are known; lse may be -inf."""
        maximum = jnp.maximum(self.maximum, lse)
        total = jnp.exp(lse - finite(maximum))
        return self._plus(maximum, total, total[..., None] * out)

    def _plus(self, maximum, total, out):
        decay = jnp.exp(self.maximum - finite(maximum))
        return Softmax(maximum, decay * self.total + total, decay[..., None] * self.out + out)

    def result(self):
        """Normalised output and log-sum-exp; 0 and -inf over nothing."""
        total = jnp.where(self.total == 0, 1, self.total)
        return self.out / total[..., None], jnp.where(self.total == 0, -jnp.inf, self.maximum + jnp.log(total))


def finite(maximum):
    """What may be subtracted from logits of which it is the maximum: 0 where all are -inf."""
    return jnp.where(jnp.isneginf(maximum), 0, maximum)


def logits_of(q, k):
    """Of queries [B, K, G, t, H] and keys [B, K, S, H], in the precision of the keys, accumulated in the queries'."""
    precision = HIGHEST if k.dtype == q.dtype else None
    return jnp.einsum("bkgth,bksh->bkgts", q.astype(k.dtype), k, precision=precision, preferred_element_type=q.dtype)


def carried(q, product):
    """Queries [B, K, G, t, H] carried back through superchunks, whose products P are [B, K, H, H]."""
    return jnp.einsum("bkgth,bkhi->bkgti", q, product, precision=HIGHEST)


def num_steps(needed):
    """Pages up to the last one that any row and key head needs; needed: bool [B, K, P]."""
    return jnp.max(jnp.where(needed, jnp.arange(needed.shape[2]) + 1, 0))


def refuses_pages(k, v) -> None:
    """No cache is refused."""
    del k, v


def attend_pages(q, k, v, products, gate, inside, position, pages, needed, *, gate_scale, window, interpret=False):
    """Output and log-sum-exp over closed superchunks.

    Args:
      q: at least float32 [B, K, G, t, H], scaled, in the frame of the start of the row's open superchunk.
      k, v: pools [pool, K, S, H] and [pool, K, S, Hv].
      products: pool [pool, K, H, H] in q's dtype, or None.
      gate: pool [pool, K, G, S] in q's dtype, sums of the log gate since the page's start, inclusive; or None.
      inside: [B, K, G, t], the same sums at the queries, or None.
      position: int32 [B, t], of the queries in their superchunk.
      pages: int32 [B, P], the row's pages in the pool, nearest first; past its last one anything in range.
      needed: bool [B, K, P], which of them to attend to.
      gate_scale: factor of the gate.
      window: query i sees keys i - window + 1 ... i; None: all.
      interpret: of other implementations; nothing is to be interpreted here.

    Returns:
      out [B, K, G, t, Hv] and lse [B, K, G, t] in q's dtype; 0 and -inf where nothing is needed.
    """
    del interpret
    superchunk = k.shape[2]

    def visit(i, carry):
        state, q, between = carry
        page = pages[:, i]

        def attend(state):
            logits = logits_of(q, k[page])
            if gate is not None:
                later = between[..., None] + gate[page][..., -1:] - gate[page]  # from each key to the open superchunk
                logits += gate_scale * (inside[..., None] + later[:, :, :, None])
            is_visible = needed[:, :, None, None, None, i]
            if window is not None:
                distance = position[..., None] + (i + 1) * superchunk - jnp.arange(superchunk)
                is_visible &= (distance < window)[:, None, None]
            return state.add(jnp.where(is_visible, logits, -jnp.inf), v[page])

        state = jax.lax.cond(needed[:, :, i].any(), attend, lambda state: state, state)
        if products is not None:
            q = carried(q, products[page])
        if gate is not None:
            between = between + gate[page][..., -1]
        return state, q, between

    state = Softmax.over_nothing(q.shape[:4], v.shape[3], q.dtype)
    return jax.lax.fori_loop(0, num_steps(needed), visit, (state, q, jnp.zeros(q.shape[:3], q.dtype)))[0].result()
