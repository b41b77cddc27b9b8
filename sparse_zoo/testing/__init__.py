"""Conformance: what every method and every kernel must hold, for ours and for yours.

    sparse_zoo.testing.check_method("moc", top_k=3)     # or a class; raises one error that lists all failures
    sparse_zoo.testing.check_kernel("cpu")              # or a Kernel

Needs torch alone. pytest is imported by `parametrize_methods` only; `check_kernel` draws further plans with Hypothesis
where that is installed.
"""

from sparse_zoo.testing import slow_blocks, slow_blockwise, slow_coarse, slow_tiles
from sparse_zoo.testing.kernels import KernelSubject, check_kernel, kernel_checks, run_kernel_checks
from sparse_zoo.testing.methods import check_method, checks, parametrize_methods, run_checks
from sparse_zoo.testing.routing import slow_routing
from sparse_zoo.testing.subject import Subject
from sparse_zoo.testing.suite import Check, CheckFailure, ConformanceError, Outcome, Skip

__all__ = [
    "Check",
    "CheckFailure",
    "ConformanceError",
    "KernelSubject",
    "Outcome",
    "Skip",
    "Subject",
    "check_kernel",
    "check_method",
    "checks",
    "kernel_checks",
    "parametrize_methods",
    "run_checks",
    "run_kernel_checks",
    "slow_blocks",
    "slow_blockwise",
    "slow_coarse",
    "slow_routing",
    "slow_tiles",
]
