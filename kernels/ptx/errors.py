"""What can be wrong with a kernel or its launch. Each check has a class of its own."""

from fusion_edge.runtime.errors import FusionError


class PtxError(FusionError):
    """A kernel or launch that a GPU would run wrongly, or that the interpreter does not know."""


class InvalidPtx(PtxError):
    """Text that is not PTX, or operands that do not fit their instruction."""


class UnknownInstruction(PtxError):
    """An instruction that the interpreter does not know."""


class InvalidLaunch(PtxError):
    """A grid, block or arguments that do not fit the kernel."""


class OutOfBounds(PtxError):
    """An access outside of every buffer, or of the shared memory of the launch."""


class Misaligned(PtxError):
    """An access whose address is not a multiple of its size."""


class Uninitialized(PtxError):
    """A read of shared memory that nothing wrote, or a result that depends on an undefined register."""


class UndefinedResult(PtxError):
    """An integer division by zero."""


class DataRace(PtxError):
    """Accesses of two threads to the same bytes, one at least a store, that no barrier orders."""


class DivergentThreads(PtxError):
    """A barrier that not all threads of the block reach, or a warp's instruction that not all of the warp do."""
