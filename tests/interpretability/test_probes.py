"""Probes find what is there, and nothing in shuffled labels."""

import sys

import numpy as np
import pytest

from path_jax.interpretability import Site, linear_probes

ROWS, LENGTH = 120, 6
rng = np.random.default_rng(0)
LABELS = rng.integers(0, 3, ROWS)
AT = rng.integers(0, LENGTH, ROWS)


def values(site_shape):
    """Noise, but for the label's direction at the position AT."""
    x = rng.standard_normal((ROWS, LENGTH, *site_shape))
    directions = 4 * rng.standard_normal((3, *site_shape))
    x[np.arange(ROWS), AT] += directions[LABELS]
    return x


@pytest.mark.parametrize("folds", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_probes_read_labels_where_they_are(folds):
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    missing = np.where(np.arange(ROWS) < 20, -1, AT)
    positions = {"there": AT, "elsewhere": (AT + 1) % LENGTH, "in most rows": missing}
    found = linear_probes(
        {Site(0, "mixer_out"): values((8,)), "1.mixer.v": values((2, 4))}, LABELS, positions, folds=folds
    )
    assert [(str(probe.site), probe.role) for probe in found] == [
        (site, role) for site in ("0.mixer_out", "1.mixer.v") for role in positions
    ]
    for probe in found:
        assert probe.num_rows == (100 if probe.role == "in most rows" else ROWS)
        assert probe.control < 0.6
        assert probe.accuracy < 0.6 if probe.role == "elsewhere" else probe.accuracy > 0.9


def test_queries_of_weights_are_probed():
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    weights = np.moveaxis(values((2, LENGTH)), 2, 1)  # [B, N, T, S]
    (probe,) = linear_probes({"0.mixer.attn_probs": weights}, LABELS, {"there": AT})
    assert probe.accuracy > 0.9


def test_what_does_not_fit(monkeypatch):
    x = {"0.mixer_out": values((8,))}
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"probes need scikit-learn; run: pip install path-jax\[interp\]"):
        linear_probes(x, LABELS, {"there": AT})
    monkeypatch.undo()
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    with pytest.raises(ValueError, match="but 0.mixer_out has 120 rows"):
        linear_probes(x, LABELS[:5], {"there": AT})
    with pytest.raises(ValueError, match="positions of 'there' are"):
        linear_probes(x, LABELS, {"there": AT[:5]})
