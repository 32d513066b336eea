"""What a constructor's signature says of its settings, those that it hands on to its base included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

from kdcli.config.schema import Batch
from kdcli.config.signature import Setting, component_in, settings


class Widths(TypedDict, total=False):
    width: float
    color: Literal["red", "blue"]


class MoreWidths(Widths, total=False):
    height: float


class Base:
    def __init__(self, *, width: float = 1.0, color: Literal["red", "blue"] = "red") -> None: ...


class Handing(Base):
    def __init__(self, *, own: int, **rest: Unpack[Widths]) -> None:
        super().__init__(**rest)


class Overriding(Base):
    """Its own `width` wins over the base's, in type and default."""

    def __init__(self, *, width: int = 5, **rest: Unpack[Widths]) -> None: ...


class Between(Base):
    def __init__(self, *, height: float = 2.0, **rest: Unpack[Widths]) -> None:
        super().__init__(**rest)


class Silent(Between):
    """A class without a constructor stands in between."""


class Nested(Silent):
    """Two constructors, and a class without one, below the default of `width`."""

    def __init__(self, *, own: str = "x", **rest: Unpack[MoreWidths]) -> None:
        super().__init__(**rest)


class Nearest(Overriding):
    """Of two bases that have a default for `width`, the nearer one's."""

    def __init__(self, **rest: Unpack[Widths]) -> None: ...


class Demanding:
    def __init__(self, *, width: float) -> None: ...


class HandsOnWhatMustBeGiven(Demanding):
    def __init__(self, **rest: Unpack[Widths]) -> None: ...


class Anything(Base):
    def __init__(self, *, own: int = 1, **rest: Any) -> None: ...


class Unannotated(Base):
    def __init__(self, *, own: int = 1, **rest) -> None: ...


def test_a_constructor_without_more_keywords_has_its_own() -> None:
    assert settings(Base) == {
        "width": Setting(float, False, 1.0),
        "color": Setting(Literal["red", "blue"], False, "red"),
    }


def test_unpacked_keys_are_settings_with_the_types_of_the_dict_and_the_defaults_of_the_base() -> None:
    assert settings(Handing) == {
        "own": Setting(int, True, settings(Handing)["own"].default),
        "width": Setting(float, False, 1.0),
        "color": Setting(Literal["red", "blue"], False, "red"),
    }


def test_a_constructors_own_key_wins() -> None:
    found = settings(Overriding)
    assert found is not None
    assert found["width"] == Setting(int, False, 5)
    assert found["color"] == Setting(Literal["red", "blue"], False, "red")


def test_defaults_are_found_through_several_bases() -> None:
    assert settings(Nested) == {
        "own": Setting(str, False, "x"),
        "height": Setting(float, False, 2.0),
        "width": Setting(float, False, 1.0),
        "color": Setting(Literal["red", "blue"], False, "red"),
    }


def test_the_nearest_default_counts() -> None:
    assert settings(Nearest) == {
        "width": Setting(float, False, 5),
        "color": Setting(Literal["red", "blue"], False, "red"),
    }


def test_a_class_without_a_constructor_has_its_bases() -> None:
    assert settings(Silent) == settings(Between)


def test_a_key_that_no_base_has_a_default_for_must_be_given() -> None:
    found = settings(HandsOnWhatMustBeGiven)
    assert found is not None
    assert found["width"].required
    assert found["color"].required


def test_any_other_keyword_argument_takes_anything() -> None:
    assert settings(Anything) is None
    assert settings(Unannotated) is None


def test_a_function_that_unpacks_takes_anything_too() -> None:
    """It has no base in which to look for defaults."""

    def function(**rest: Unpack[Widths]) -> None: ...

    assert settings(function) is None


def test_the_first_parameters_may_be_left_out() -> None:
    def schedule(optimizer: Any, num_steps: int, *, last: float = -1.0) -> None: ...

    assert settings(schedule, skip=1) == {
        "num_steps": Setting(int, True, settings(schedule)["num_steps"].default),
        "last": Setting(float, False, -1.0),
    }


def test_a_dataclass_has_its_fields_and_their_bounds() -> None:
    found = settings(Batch)
    assert found is not None
    assert found["size"] == Setting(int, False, 8, 1)
    assert found["packing"] == Setting(bool, False, False)


def test_every_objective_takes_the_settings_of_all() -> None:
    from kdcli.objective.generalized_jsd import GeneralizedJSD

    found = settings(GeneralizedJSD)
    assert found is not None
    assert {"beta", "temperature", "temperature_scale", "weight", "domains", "reduction"} <= found.keys()
    assert not any(setting.required for setting in found.values())
    assert found["reduction"].default == "token"


def test_a_component_is_seen_inside_a_collection() -> None:
    from kdcli.api import Data, Teacher

    assert component_in(Data) == ("data", Data)
    assert component_in(Sequence[Teacher]) == ("teacher", Teacher)
    assert component_in(Mapping[str, Data] | None) == ("data", Data)
    assert component_in(Mapping[str, float]) is None
    assert component_in(float) is None
