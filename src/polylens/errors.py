"""Every error and warning that polylens raises on purpose."""


class PolylensError(Exception):
    """Base class: `except PolylensError` catches whatever polylens refuses."""


class InvalidInputError(PolylensError, ValueError):
    """A value, shape or dtype that the called function cannot use."""


class UnsupportedActivation(PolylensError, ValueError):
    """An activation that is unknown, not elementwise, or not finite."""


class UnsupportedModel(PolylensError, ValueError):
    """A model, or one of its layers, that has no normal form polylens can read."""


class AttachmentError(PolylensError, RuntimeError):
    """Attach, detach or replace was asked for in a state that does not allow it."""


class StalePolynomialError(AttachmentError):
    """The weights changed after the polynomial was fitted to them."""


class NumericalWarning(UserWarning):
    """The result is right, but the data or the matrix behind it was degenerate."""
