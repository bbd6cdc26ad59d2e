"""The columns of what the low-level operators return for each row: the C++ code (csrc/generate.py) and the kernels in CUDA and
Triton take their places from here; in torch ``Stats(*stats.unbind(1))`` has them by name, and ``torch.stack(Stats(...), 1)`` puts
them together. The build loads this file by itself, so it imports nothing of the package.

T is the temperature; x, y, z are student, target and teacher logits after the head. Losses and entropies are in nats, unweighted.
"""

from collections import namedtuple

# What a sweep over the vocabulary must know before the gradient. A log-sum-exp is kept as the largest entry and the log of the sum
# of exp(entry - largest): their sum, rounded, would put the rounding error of the largest logit into every probability.
# mass, moment: sums of e^u and e^u (u - v) over what is not banned; u, v: the weighing and the other side's entries less the
# largest.
Stats = namedtuple(
    "Stats",
    "max_x_T log_sum_x_T max_y_T log_sum_y_T max_x log_sum_x max_z_T log_sum_z_T argmax_x argmax_z label_logit mass moment",
)
Sums = namedtuple("Sums", "value slope target_entropy student_entropy overlap")
Row = namedtuple("Row", "kd ce target_entropy student_entropy agreement overlap")
STATS_COLUMNS, SUMS_COLUMNS, ROW_COLUMNS = Stats._fields, Sums._fields, Row._fields
# How many of the statistics the sums are made from, and the gradient.
SUMS_READ, GRADIENT_READ = STATS_COLUMNS.index("log_sum_z_T") + 1, STATS_COLUMNS.index("log_sum_x") + 1

# By whose exponentials mass and moment are weighed, as kernels are told.
WEIGH = {"": 0, "target": 1, "student": 2}
