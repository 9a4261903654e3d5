"""Fine-tune convolutional networks at the cost of fused ones: torch.compile(model, backend="convbn_tune")."""

from convbn_compile.explain import explain as explain
from convbn_compile.modes import freeze_batch_norm as freeze_batch_norm
from convbn_compile.modes import turn_off as turn_off
from convbn_compile.modes import turn_on as turn_on
from convbn_compile.modes import unfreeze_batch_norm as unfreeze_batch_norm
from convbn_compile.report import Refusal as Refusal
from convbn_compile.report import Report as Report
from convbn_compile.scaling import scaling_coefficients as scaling_coefficients

__version__ = "0.1.0"
