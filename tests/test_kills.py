"""The short form of ``python tests/kills.py``."""

import pytest
from kills import run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_ends_as_if_it_was_not(tmp_path, embedded_file):
    assert run(kills=3, processes=2, seed=0, folder=tmp_path, features=embedded_file) == []
