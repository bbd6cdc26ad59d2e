"""A teacher that is run once, and then distilled without it: ``python examples/cached_teacher.py``."""

import tempfile
from pathlib import Path

import tiny

from kdkernels.transformers import KDConfig, KDTrainer, write_cache

tokenizer = tiny.tokenizer()
data = tiny.examples(tokenizer)[:240]

with tempfile.TemporaryDirectory() as folder:
    write_cache(tiny.teacher(data), data, Path(folder) / "cache", top_k=32)
    size = sum(file.stat().st_size for file in (Path(folder) / "cache").iterdir())
    print(f"{len(data) * tiny.WINDOW:,} positions, 32 tokens of each: {size / 2**20:.1f} MiB")
    settings = KDConfig(
        f"{folder}/run",
        method="forward_kl",
        learning_rate=3e-3,
        max_steps=30,
        logging_steps=10,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
    )
    trainer = KDTrainer(
        tiny.model(width=64, seed=1),
        settings,
        train_dataset=data,
        processing_class=tokenizer,
        teacher=f"{folder}/cache",
        teacher_processing_class=tokenizer,
    )
    trainer.train()

whole = len(data) * tiny.WINDOW * tiny.VOCAB * 4
print(
    f"\nHow to read it: the teacher ran once, and {size / 2**20:.1f} MiB of its predictions took its place; all its logits\n"
    f"would be {whole / 2**20:.0f} MiB. loss and kd are how far the student is from them, in nats a token; ce is its\n"
    "cross-entropy on the text. agreement is how often both have the same most likely token, overlap the probability that they\n"
    "share on the tokens that were kept."
)
