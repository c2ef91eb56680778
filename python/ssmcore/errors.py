"""The exceptions ssmcore raises.

The native module imports this one to raise them, so it imports nothing else of the package.
"""


class Error(Exception):
    """Every failure ssmcore reports. The message names the function, what was expected and came."""


class InvalidArgumentError(Error, ValueError):
    """An argument, path or checkpoint that the function does not take."""


class NotFiniteError(Error, ArithmeticError):
    """Training met an infinity or a NaN: the message names the step and the tensor."""


class BackendError(Error, RuntimeError):
    """A valid request that this build or device cannot meet, or a failure of the device."""
