"""Methods are looked up by name, and all of them pass the suites that ship with srcr."""

import pytest

from srcr import methods
from srcr.errors import InputError
from srcr.testing import check_pruner, check_quantizer


@pytest.mark.parametrize("name", methods.pruners())
def test_every_pruner_conforms(name):
    check_pruner(name)


@pytest.mark.parametrize("name", methods.quantizers())
def test_every_quantizer_conforms(name):
    check_quantizer(name)


def test_methods_are_known_under_their_own_names():
    assert set(methods.pruners()) >= {"magnitude", "wanda", "sparsegpt"}
    assert set(methods.quantizers()) >= {"rtn", "gptq"}
    for name in methods.pruners():
        assert methods.get_pruner(name).name == name
    for name in methods.quantizers():
        assert methods.get_quantizer(name).name == name


def test_every_method_says_what_it_is_and_where_it_comes_from():
    for method in [*methods.pruners().values(), *methods.quantizers().values()]:
        assert method.summary
        assert method.paper


@pytest.mark.parametrize("get", [methods.get_pruner, methods.get_quantizer])
def test_an_unknown_name_is_answered_with_the_known_ones(get):
    known = methods.pruners() if get is methods.get_pruner else methods.quantizers()
    with pytest.raises(InputError) as caught:
        get("sparsgpt")
    assert all(name in str(caught.value) for name in ["'sparsgpt'", *known])


def test_a_pruner_is_not_a_quantizer():
    with pytest.raises(InputError):
        methods.get_quantizer("sparsegpt")
    with pytest.raises(InputError):
        methods.get_pruner("gptq")
