"""One thread per process: the networks of the tests are small, and threads of several tests would collide."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
