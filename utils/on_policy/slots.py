"""Slots: the windows of an optimizer step that the student writes itself, a pure function of share and step.

A slot is a place in the order of a step's windows, whatever micro-batches and processes they are cut into. The given
window of a slot is taken as ever; the student's text takes its place, written behind that window's beginning.
"""

from fractions import Fraction

COUNT_STEP, PLACE_STEP = 0xC13FA9A9, 0x91E10DA5
"""The plastic number's inverse and its square in 32 bits: their multiples fill a square as evenly as can be."""
RANGE = 2**32


def own_slots(share: float, step: int, windows: int) -> list[int]:
    """Return the slots of a step that the student writes, in order and spread evenly.

    Their number is `share * windows`, rounded down in some steps and up in others, so that it is right in the mean.

    Args:
        share: from 0 to 1.
        windows: slots of the step.
    """
    # whole numbers: nothing is left to the rounding of a machine
    rounding = (step + 1) * COUNT_STEP % RANGE
    count = min(windows, int(Fraction(share) * windows + Fraction(rounding, RANGE)))

    offset = (step + 1) * PLACE_STEP % RANGE
    return [(number * RANGE + offset) * windows // (count * RANGE) for number in range(count)]
