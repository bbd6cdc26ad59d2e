"""The losses under the names and conventions of other libraries: drop-ins.

- ``kdkernels.compat.liger`` has Liger-Kernel's ``LigerFusedLinearJSDLoss``; Liger need not be installed.
- ``kdkernels.compat.trl`` lets TRL's GKDTrainer and DistillationTrainer compute their loss here.

Nothing is imported by this package itself.
"""
