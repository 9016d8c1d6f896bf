"""Side-by-side measurements that back the numbers we state."""

import os

# Before anything imports torch: OpenMP threads that spin while they wait take the cores from each other as soon as
# another process runs, and then time the scheduler instead of the code (seen: 4 s against 12 to 37 s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
