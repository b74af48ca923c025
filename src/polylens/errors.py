"""Every error and warning that polylens raises on purpose."""


class PolylensError(Exception):
    """Base class: `except PolylensError` catches whatever polylens refuses."""


class InvalidInputError(PolylensError, ValueError):
    """A value, shape or dtype that the called function cannot use."""


class OutOfMemory(InvalidInputError, MemoryError):
    """More memory than there is: how much is asked for, how much is free, what to do."""


class UnsupportedActivation(PolylensError, ValueError):
    """An activation that is unknown, not elementwise, or not finite."""


class UnsupportedModel(PolylensError, ValueError):
    """A model, or one of its layers, that has no normal form polylens can read."""


class AttachmentError(PolylensError, RuntimeError):
    """Attach, detach or replace was asked for in a state that does not allow it."""


class StalePolynomialError(AttachmentError):
    """The weights changed after the polynomial was fitted to them."""


class ArtifactError(PolylensError, ValueError):
    """A file that cannot be saved or loaded: damaged, of another kind, or from a later version."""


class RankError(PolylensError, RuntimeError):
    """Another process of torch.distributed failed, died, or did not answer in time."""


class ConvergenceError(PolylensError, ArithmeticError):
    """An iterative solver did not reach the residual it was asked for."""


class NumericalWarning(UserWarning):
    """The result is right, but the data or the matrix behind it was degenerate."""
