"""A student's LoRA adapters, distilled by KDTrainer: ``python examples/trainer_lora.py``."""

import tempfile

import tiny
from peft import LoraConfig, get_peft_model

from kdkernels.transformers import KDConfig, KDTrainer

tokenizer = tiny.tokenizer()
data = tiny.examples(tokenizer)
adapters = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
student = get_peft_model(tiny.trained(data[64:], width=64, seed=1), adapters)
student.print_trainable_parameters()

with tempfile.TemporaryDirectory() as folder:
    trainer = KDTrainer(
        student,
        KDConfig(
            folder,
            method="jsd",
            ce_weight=0.1,
            learning_rate=1e-2,
            max_steps=30,
            logging_steps=10,
            per_device_train_batch_size=8,
            eval_strategy="steps",
            eval_steps=15,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=data[64:],
        eval_dataset=data[:64],
        processing_class=tokenizer,
        teacher=tiny.teacher(data[64:]),
        teacher_processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # the adapters

print(
    "\nHow to read it: only the adapters moved. kd is the Jensen-Shannon divergence to the teacher, in nats a token, at most\n"
    "ln 2 = 0.69; ce is the cross-entropy on the text, and the loss is kd + 0.1 ce. The lines with eval_ are of text that was\n"
    "held out: what falls there too was not learned by heart."
)
