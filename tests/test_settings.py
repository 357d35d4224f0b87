"""Flags to dataclasses: what overrides what, which numbers are refused, and under what a run may go on."""

from dataclasses import dataclass, field

import pytest

from plumbing.settings import (
    MAY_CHANGE,
    InputError,
    MachineConfig,
    absolute,
    check_signs,
    one_sentence,
    parse,
)


@dataclass
class Colours:
    colour: str = field(default="red", metadata={"help": "of the house"})
    size: int = field(default=1, metadata={"help": "of the house"})


def test_flags_override_what_the_overrides_override():
    given = []

    def overrides(colours):
        given.append(colours.colour)
        return {"colour": "blue", "size": 2}

    assert parse((Colours,), ["--size", "3"], "", overrides) == (Colours("blue", 3),)
    assert parse((Colours,), ["--colour", "green"], "", overrides) == (Colours("green", 2),)
    assert given == ["red", "green"]  # overrides see the flags


@pytest.mark.parametrize("argv", [["--siz", "3"], ["--size", "three"], ["house"], ["--hue", "3"], ["--size"]])
def test_flags_that_are_unknown_shortened_or_no_number_are_refused(argv):
    with pytest.raises(InputError, match="see --help") as caught:
        parse((Colours,), argv, "", lambda colours: {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "zero_is_fine"), [(0, True), (1, True), (1, False), (0.5, False), (True, False)]
)
def test_numbers_that_pass(value, zero_is_fine):
    check_signs(Colours(size=value), {"size"} if zero_is_fine else set())


@pytest.mark.parametrize(
    ("value", "zero_is_fine", "message"),
    [
        (0, False, "size must be above 0, got 0"),
        (-1, True, "size must be at least 0, got -1"),
        (float("nan"), True, "size must be at least 0, got nan"),
        (float("inf"), False, "size must be above 0, got inf"),
    ],
)
def test_numbers_that_do_not(value, zero_is_fine, message):
    with pytest.raises(ValueError, match=message):
        check_signs(Colours(size=value), {"size"} if zero_is_fine else set())


def test_a_share_of_the_gpu_is_at_most_all_of_it():
    MachineConfig(gpu_memory=1.0).check(may_be_zero=set())
    with pytest.raises(ValueError, match="gpu_memory is a share of the GPU, at most 1, got 1.5"):
        MachineConfig(gpu_memory=1.5).check(may_be_zero=set())


def test_a_run_goes_on_under_other_places_lengths_engines_and_memory_knobs_only():
    where_and_how_long = (
        "output_dir same_run steps token_budget save_every keep_checkpoints plan gpu_gb track"
    )
    engines = "engine max_engine_gap gpu_memory engine_sleep tensor_parallel threads"
    memory = "microbatch_tokens logit_chunk gradient_checkpointing max_skipped_updates"
    assert MAY_CHANGE == set(f"{where_and_how_long} {engines} {memory}".split())


def test_paths_that_exist_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert absolute("model") == str(tmp_path.resolve() / "model") and absolute("org/model") == "org/model"


def test_only_value_errors_become_input_errors():
    with pytest.raises(InputError, match="^too long$"), one_sentence():
        raise ValueError("too long")
    with pytest.raises(KeyError), one_sentence():
        raise KeyError("a bug")
