"""`headrace serve` with the simulated GPU behind --device tensorrt: the real command, process and session.

python -m tests.support.simulated.server ARTIFACT --device tensorrt --port 0
"""

import sys
from collections.abc import Sequence

from runtime.backends.backend import Backend, Problem
from runtime.backends.cuda.cuda import Cuda
from runtime.backends.environment import Environment
from runtime.backends.registry import BACKENDS
from runtime.backends.tensorrt.backend import TensorRt
from runtime.backends.tensorrt.library import TrtLibrary
from runtime.errors import HeadraceError, InvalidSetting
from serve.cli import main
from tests.support.simulated.cuda import SimCuda
from tests.support.simulated.session import TARGET
from tests.support.simulated.tensorrt import VERSION, SimTensorRT


class SimulatedTensorRt(TensorRt):
    """The real backend on the doubles, whose GPU no file of this machine tells of."""

    def missing_hardware(self, env: Environment) -> Problem | None:
        return None


def simulated_tensorrt(sim: SimCuda) -> SimulatedTensorRt:
    """TensorRT on a simulated GPU."""

    def open_trt(target: str) -> TrtLibrary:
        if target != TARGET:
            raise InvalidSetting(f"{target} is not installed")
        return TrtLibrary(target, SimTensorRT(sim), VERSION)

    return SimulatedTensorRt(lambda: Cuda(sim), open_trt)


def simulated_backends(sim: SimCuda) -> Sequence[Backend]:
    """The backends, TensorRT's being the real one on the doubles."""
    return (simulated_tensorrt(sim), *BACKENDS[1:])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], backends=simulated_backends(SimCuda())))
    except HeadraceError as error:
        sys.stderr.write(f"headrace serve: {error}\n")
        sys.exit(2)
