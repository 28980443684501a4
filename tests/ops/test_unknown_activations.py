"""Activations that no kernel knows are refused by name."""

import pytest
from accepted_calls import block_arguments

import jax_marlin_moe as jmm
from jax_marlin_moe.activations import Activation


class Louder(Activation):
    def apply(self, gate, up):
        return 2 * super().apply(gate, up)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_an_activation_of_a_class_of_its_own_is_refused(implementation):
    with pytest.raises(TypeError, match=r"activation has type Louder; it must be a name, or made by one of .*swiglu"):
        jmm.fused_moe(**block_arguments() | {"activation": Louder("silu"), "implementation": implementation})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mine",), "name is 'mine'; it must be one of gelu, .*silu, .*swiglu"),
        (("silu", (1.0,)), r"parameters is \(1.0,\); 'silu' takes 0 of them"),
        (("swiglu", (0.0, 1.0, 0.0)), "limit is 0.0; it must be positive"),
        (("swiglu_step", (-1.0,)), "limit is -1.0; it must be positive"),
        (("situ", (4.0, 0.0)), "linear_beta is 0.0; it must be positive"),
        (("situ", (float("nan"), 1.0)), "beta is nan; it must be positive"),
    ],
)
def test_activations_that_the_kernels_do_not_know_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        Activation(*arguments)


def test_an_activation_computes_what_its_name_says():
    with pytest.raises(TypeError, match="unexpected keyword argument 'apply'"):
        Activation("silu", apply=lambda gate, up: gate)


def test_parameters_that_are_no_numbers_are_refused_by_name():
    with pytest.raises(TypeError, match=r"parameters is \('7', 1, 0\); they must be numbers"):
        Activation("swiglu", ("7", 1, 0))
    for make, message in ((lambda: jmm.swiglu("7"), "limit is '7'"), (lambda: jmm.situ(None), "beta is None")):
        with pytest.raises(TypeError, match=f"{message}; it must be a number"):
            make()
