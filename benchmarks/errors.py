"""What can go wrong with a measurement."""

__all__ = ["Broken", "OutOfTime"]


class Broken(Exception):
    """A measurement that proves nothing: something failed, was refused, or is not there."""


class OutOfTime(BaseException):
    """The whole run took too long. Not an Exception: nobody may go on with the next figure."""
