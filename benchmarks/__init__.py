"""Side-by-side measurements that back every number the project states. Each runs with `python -m benchmarks.<name>`."""

import scripts  # noqa: F401 (makes the same settings of the process as training)
