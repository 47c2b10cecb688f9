"""`headrace serve` with the simulated GPU behind --device tensorrt: the real command, process and session.

python -m tests.support.simulated.server ARTIFACT --device tensorrt --port 0
"""

import sys
from collections.abc import Mapping
from functools import partial

from runtime.backends.cuda.cuda import Cuda
from runtime.backends.select import BACKENDS, Backend, open_on_tensorrt
from runtime.backends.tensorrt.library import TrtLibrary
from runtime.errors import HeadraceError, InvalidSetting
from serve.cli import main
from tests.support.simulated.cuda import SimCuda
from tests.support.simulated.session import TARGET
from tests.support.simulated.tensorrt import VERSION, SimTensorRT


def simulated_backends(sim: SimCuda) -> Mapping[str, Backend]:
    """The backends, TensorRT's being the real one on the doubles."""

    def open_trt(target: str) -> TrtLibrary:
        if target != TARGET:
            raise InvalidSetting(f"{target} is not installed")
        return TrtLibrary(target, SimTensorRT(sim), VERSION)

    return {**BACKENDS, "tensorrt": partial(open_on_tensorrt, open_cuda=lambda: Cuda(sim), open_trt=open_trt)}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], backends=simulated_backends(SimCuda())))
    except HeadraceError as error:
        sys.stderr.write(f"headrace serve: {error}\n")
        sys.exit(2)
