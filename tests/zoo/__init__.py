"""The test zoo: small models with the groups that they must have; see `zoo.case` for the notation."""

from zoo import convolutional, movement, reduction, sequence
from zoo.case import CASES, Case

__all__ = ["CASES", "Case", "convolutional", "movement", "reduction", "sequence"]
