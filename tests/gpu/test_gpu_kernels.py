"""Moving pages and tables of evicted rows: the tests of ``test_kernels.py``, with tensors on the GPU."""

import pytest
from test_kernels import layout, test_move, test_read, test_rows_are_what_lists_would_be

__all__ = ["layout", "test_move", "test_read", "test_rows_are_what_lists_would_be"]

pytestmark = pytest.mark.gpu
