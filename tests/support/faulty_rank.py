"""A computing rank that stands still in a step, while there is a file "wedge" in the directory $FAULTS."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import mlx_api_server
from mlxserver.engine.distributed import models

WEDGE = Path(os.environ["FAULTS"]) / "wedge"


class StalledScheduler(models.Scheduler):
    def decode(self):
        while WEDGE.exists():
            time.sleep(0.01)
        return super().decode()


if __name__ == "__main__":
    models.Scheduler = StalledScheduler
    sys.exit(mlx_api_server.main())
