"""Side-by-side measurements that back every number the project states. Each runs with `python -m benchmarks.<name>`."""

import scripts  # noqa: F401 (the same settings of the process as in training)
