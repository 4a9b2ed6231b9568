"""The short forms of ``python tests/kills.py``."""

import pytest
from kills import run


def test_a_run_that_is_killed_in_a_save_ends_as_if_it_was_not(tmp_path, embedded_file):
    assert run(kills=1, processes=1, seed=0, folder=tmp_path, features=embedded_file) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(tmp_path, embedded_file):
    assert run(kills=2, processes=2, seed=0, folder=tmp_path, features=embedded_file) == []
