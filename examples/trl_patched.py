"""TRL's GKDTrainer without its logits: ``python examples/trl_patched.py`` (TRL 1.16.0)."""

import tempfile

import tiny
from datasets import Dataset
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kdkernels.compat.trl import gkd_trainer_patched

tokenizer = tiny.tokenizer()
tokenizer.chat_template = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
lines = [line.strip() for module in tiny.text() for line in module.splitlines() if 20 < len(line.strip()) < 60]
chats = [
    {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
    for one, other in zip(lines[:160:2], lines[1:160:2], strict=True)
]

with tempfile.TemporaryDirectory() as folder, gkd_trainer_patched():  # the block is all that is new
    trainer = GKDTrainer(
        model=tiny.model(width=64, seed=1),
        teacher_model=tiny.teacher(tiny.examples(tokenizer)),
        args=GKDConfig(
            folder,
            beta=0.5,
            lmbda=0.0,  # the data's answers; 1.0: the student's own
            max_steps=10,
            logging_steps=5,
            max_length=tiny.WINDOW,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            report_to=[],
            use_cpu=True,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(chats),
    )
    trainer.train()

print(
    "\nHow to read it: the loss is GKDTrainer's own, the Jensen-Shannon divergence of beta = 0.5 to the teacher, in nats a token;\n"
    "without the patch it has the same values up to rounding, and takes the memory of both models' logits besides."
)
