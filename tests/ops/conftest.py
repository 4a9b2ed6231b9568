from collections.abc import Iterator

import pytest
from op_testing import poisoned


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, integers their largest value: what nobody writes shows."""
    with poisoned():
        yield
