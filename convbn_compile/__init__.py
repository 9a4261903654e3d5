"""Fine-tune convolutional networks at the cost of fused ones: torch.compile(model, backend="convbn_tune")."""

from convbn_compile.deploy import refresh as refresh
from convbn_compile.estimate import MemoryEstimate as MemoryEstimate
from convbn_compile.estimate import estimate_memory as estimate_memory
from convbn_compile.explain import explain as explain
from convbn_compile.fuse import Fused as Fused
from convbn_compile.fuse import fuse as fuse
from convbn_compile.largest_batch import largest_batch as largest_batch
from convbn_compile.modes import freeze_batch_norm as freeze_batch_norm
from convbn_compile.modes import turn_off as turn_off
from convbn_compile.modes import turn_on as turn_on
from convbn_compile.modes import unfreeze_batch_norm as unfreeze_batch_norm
from convbn_compile.patch import inductor_patched as inductor_patched
from convbn_compile.patch import patch_inductor as patch_inductor
from convbn_compile.patch import unpatch_inductor as unpatch_inductor
from convbn_compile.report import Refusal as Refusal
from convbn_compile.report import Report as Report
from convbn_compile.scaling import scaling_coefficients as scaling_coefficients

__version__ = "0.1.0"
