"""What `import polylens` offers, and what it says of names that are gone."""

import inspect
import types

import pytest

import polylens


def test_every_name_is_there_without_another_import():
    assert set(polylens.__all__) <= set(dir(polylens))
    assert inspect.isfunction(polylens.attach)
    assert isinstance(polylens.demo, types.ModuleType)
    assert callable(polylens.analysis.eigenfeatures)


def test_what_is_public_is_in_the_list():
    modules = {name for name, value in vars(polylens).items() if inspect.ismodule(value)}
    public = {name for name in vars(polylens) if not name.startswith("_")}
    assert public - modules - {"TYPE_CHECKING", "NoReturn", "version"} == set(polylens.__all__) - {
        "analysis",
        "demo",
    }


@pytest.mark.parametrize("name", polylens.__all__)
def test_what_is_public_says_what_it_is(name):
    assert inspect.getdoc(getattr(polylens, name))


def test_a_name_that_is_gone_names_the_new_one():
    with pytest.raises(AttributeError, match=r'load\("hf://user/name", model\)'):
        _ = polylens.from_hub
    with pytest.raises(AttributeError, match=r"no attribute 'no_such_name'$"):
        _ = polylens.no_such_name
