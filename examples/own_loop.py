"""TAID in a training loop of your own: ``python examples/own_loop.py``."""

import tiny
import torch

import kdkernels as kd
from kdkernels.transformers import hidden_states, lm_head, verify_lm_head

STEPS = 40
data = tiny.examples(tiny.tokenizer())
teacher, student = tiny.teacher(data), tiny.model(width=64, seed=1)
verify_lm_head(student)  # once: is what lm_head reads what the model does?
verify_lm_head(teacher)

optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
schedule = kd.TAIDSchedule(t_start=0.4)
for step, batch in zip(range(STEPS), tiny.batches(data), strict=False):
    labels = batch["labels"].roll(-1, dims=1)  # the loss shifts nothing
    labels[:, -1] = -100
    with torch.no_grad():
        target = hidden_states(teacher, batch)
    hidden = hidden_states(student, batch)
    loss, metrics = kd.linear_kd_loss(
        hidden, lm_head(student), target, lm_head(teacher), labels, t=schedule.t, ce_weight=0.1, return_metrics=True
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.update(metrics["kd"] + metrics["target_entropy"], progress=(step + 1) / STEPS)
    if step % 10 == 9:
        print(f"step {step + 1}: t {schedule.t:.2f}, cross-entropy {metrics['ce']:.3f}, agreement {metrics['agreement']:.1%}")

print(
    "\nHow to read it: the cross-entropy is that of the text itself, in nats a token: an untrained student has ln 4,096 = 8.3.\n"
    "The agreement is how often the student's most likely next token is the teacher's. t is the teacher's share in what the\n"
    "student learns from; the rest is the student's own prediction, so that the target starts near it."
)
