"""DTL and DTL+: frozen networks that a small side network adapts, with their first half left out of backward."""

from convbn_compile.side_tuning._attach import attach as attach
from convbn_compile.side_tuning.handle import SideTuned as SideTuned
from convbn_compile.side_tuning.handle import handle_of as handle_of
from convbn_compile.side_tuning.shared import share_backbone as share_backbone
