"""What a person runs."""

import os

# Before anything imports torch: OpenMP threads that spin while they wait take the cores from each other as soon as
# anything else runs (the first epoch of the quickstart beside another job: 49 s against 27 s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
