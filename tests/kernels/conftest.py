"""Tests parametrized with implementation="tpu" run the kernels in Pallas's interpret mode."""

import pytest

import pallas_kernels


@pytest.fixture(autouse=True)
def _interpret_tpu_kernels(request):
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and parameters.params.get("implementation") == "tpu":
        with pallas_kernels.interpret():
            yield
    else:
        yield
