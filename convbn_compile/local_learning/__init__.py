"""NeuroFlux: training a convolutional network inside a given number of bytes by adaptive local learning."""

from convbn_compile.local_learning._heads import auxiliary_head as auxiliary_head
from convbn_compile.local_learning._lines import Profile as Profile
from convbn_compile.local_learning.neuroflux import NeuroFlux as NeuroFlux
from convbn_compile.local_learning.partitioner import Block as Block
from convbn_compile.local_learning.partitioner import Plan as Plan
from convbn_compile.local_learning.report import Exit as Exit
from convbn_compile.local_learning.report import Report as Report
