"""Dr²Net: pretrained residual networks that are fine-tuned in memory that does not grow with depth."""

from convbn_compile.reversible.handle import Reversible as Reversible
from convbn_compile.reversible.handle import handle_of as handle_of
from convbn_compile.reversible.handle import make_reversible as make_reversible
from convbn_compile.reversible.precision import predicted_error as predicted_error
from convbn_compile.reversible.schedule import CoefficientSchedule as CoefficientSchedule
