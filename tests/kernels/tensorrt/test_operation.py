"""What a plugin is: its variants, their names and inputs, and the checks that operations share."""

from __future__ import annotations

import pytest

from tests.kernels.tensorrt.cases import case, check_launches
from tests.kernels.tensorrt.variants import jobs
from tilewright.kernels.tensorrt.catalogue import OPERATIONS, plugins
from tilewright.kernels.tensorrt.expressions import dimension
from tilewright.kernels.tensorrt.operation import Tensor, check_fp32, check_shape, choice, flag
from tilewright.tuning_db.errors import ProblemError, UsageError


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.title)
def test_every_set_of_inputs_has_a_plugin_of_its_own(operation):
    variants = operation.variants()
    assert len({variant.name for variant in variants}) == len(variants)
    assert len({frozenset(variant.inputs) for variant in variants}) == len(variants)
    assert variants[0].inputs == operation.required
    fewer = sum(1 for name in operation.needs) and 2 ** (len(operation.optional) - 2)  # the one without the other
    assert len(variants) == 2 ** len(operation.optional) - fewer
    assert all(variant.name.startswith(operation.title) for variant in variants)


def test_outputs_are_those_of_the_operation():
    for job in JOBS.values():
        found = case(job.plugin, job.inputs, **job.attributes)
        assert found.variant.outputs == tuple(tensor.name for tensor in found.outputs)
        assert set(found.variant.outputs) == set(job.problem(*job.sizes[0]).outputs())


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.title)
def test_inputs_stand_as_the_kernel_has_them(operation):
    wanted = [name.removesuffix("_ptr") for name in operation.kernel.jit_functions[0].arg_names]
    for variant in operation.variants():
        places = [wanted.index(name) for name in variant.inputs]
        assert places == sorted(places), variant.name


JOBS = jobs()


@pytest.mark.parametrize("name", JOBS)
def test_every_plugin_is_launched_as_this_package_launches(name):
    job = JOBS[name]
    found = case(job.plugin, job.inputs, **job.attributes)
    assert check_launches(found, job.problem, job.sizes, board="rtx4090", most=4)


def test_every_plugin_has_data_types():
    assert {name.split()[0] for name in JOBS} == set(plugins())
    for dtype in ("fp16", "bf16", "fp32", "int8", "fp8e4m3"):
        assert sum(name.endswith(f" {dtype}") for name in JOBS) > 20


def test_those_that_come_together_have_one_name():
    names = {variant.name: variant.inputs for variant in OPERATIONS[2].variants()}
    assert names["FusedAttentionScales"] == ("q", "k", "v", "q_scale", "k_scale", "v_scale")
    assert names["FusedAttentionBiasKvLens"] == ("q", "k", "v", "bias", "kv_lens")


def test_dimensions_that_must_be_static():
    tensor = Tensor("x", (dimension("x", 0), 64), "fp16")
    assert tensor.static(-1, "N") == 64
    with pytest.raises(ProblemError, match=r"^M, dimension 0 of x, must be static: it is dynamic$"):
        tensor.static(0, "M")
    assert tensor.at({("x", 0): 3}).shape == (3, 64)


def test_words_and_flags():
    assert choice({"gated": "none"}, "gated", {"none": None}) is None
    with pytest.raises(UsageError, match="gated='no' must be one of none, halves"):
        choice({"gated": "no"}, "gated", {"none": None, "halves": "halves"})
    assert flag({"causal": 1}, "causal") is True
    with pytest.raises(UsageError, match="causal=3 must be 0 or 1"):
        flag({"causal": 3}, "causal")


def test_shapes_and_scales():
    scale = Tensor("out_scale", (1,), "fp16")
    check_shape(scale, (), (1,))
    with pytest.raises(ProblemError, match=r"out_scale is \(1,\) and must be \(\) or \(2,\)"):
        check_shape(scale, (), (2,))
    with pytest.raises(ProblemError, match="out_scale is fp16 and must be fp32"):
        check_fp32({"out_scale": scale}, "a_scale", "out_scale")
