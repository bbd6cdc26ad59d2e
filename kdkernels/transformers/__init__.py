"""Hidden states and output heads of causal language models from transformers, for the losses of this library.

loss = kd.linear_kd_loss(hidden_states(student, batch), lm_head(student), hidden_states(teacher, batch), lm_head(teacher), labels)
"""

from kdkernels.transformers.heads import lm_head
from kdkernels.transformers.hidden import hidden_states
from kdkernels.transformers.verify import verify_lm_head

__all__ = ["hidden_states", "lm_head", "verify_lm_head"]
