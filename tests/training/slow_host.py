"""train.py on a host that reads its data slowly, if it is process 1; test_cluster_runs starts it."""

import runpy
import sys
import time
from pathlib import Path

from path_jax.training.placement import GlobalBatches


def main():
    if "--process_id=1" in sys.argv:
        read = GlobalBatches.__next__

        def read_slowly(batches):
            time.sleep(0.3)
            return read(batches)

        GlobalBatches.__next__ = read_slowly
    runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
