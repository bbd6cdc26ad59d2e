"""The options of ``python -m kdkernels distill``, each stated once: those of a method follow from its settings.

The command line's parser, the reader of configuration files and the run's KDConfig are all made from ``OPTIONS``, so that they have
the same names and defaults, and refuse the same values.
"""

from __future__ import annotations

from kdkernels.transformers.methods import SETTINGS
from kdkernels.transformers.settings import COUNT, NOT_NEGATIVE, PART, POSITIVE, SWITCH, TEXT, Option, integer, one_of

SOURCES = "a text, .jsonl or .json file, a folder of datasets, or a name that datasets knows"

OPTIONS: dict[str, tuple[Option, ...]] = {
    "models": (
        Option(
            "teacher", TEXT, "MODEL", "a folder that save_pretrained wrote, a name of the hub, or a folder of the cache command"
        ),
        Option("student", TEXT, "MODEL", "a folder that save_pretrained wrote, or a name of the hub"),
        Option("out", TEXT, "FOLDER", "for the student and checkpoints: a new folder, or with --resume that of an earlier run"),
        Option("dtype", one_of("auto", "float32", "bfloat16"), "NAME", "of the student's weights; auto: as saved", "float32"),
        Option("teacher_dtype", one_of("auto", "float32", "bfloat16", "float16"), "NAME", "of the teacher's weights", "auto"),
        Option("bf16", SWITCH, "", "compute in bfloat16 from float32 weights (autocast)", False, sets=("bf16",)),
        Option("gradient_checkpointing", SWITCH, "", "compute activations twice instead of keeping them", False),
    ),
    "data": (
        Option("data", TEXT, "DATA", f"{SOURCES} (with a cached teacher: the examples of the cache)"),
        Option("split", TEXT, "NAME", "of the data", "train"),
        Option("limit", COUNT, "N", "use the first N examples (default: all)"),
        Option("max_length", integer(2), "L", "tokens of an example: texts become windows, the rest is cut", 512),
        Option("eval_data", TEXT, "DATA", "held-out data, like --data (default: a part of --data)"),
        Option("eval_split", TEXT, "NAME", "of the held-out data (default: as --split)"),
        Option("eval_fraction", PART, "PART", "of the examples, held out at their end where there is no --eval-data", 0.05),
    ),
    "method": tuple(option for settings in SETTINGS for option in settings.options()),
    "training": (
        Option("steps", COUNT, "N", "optimizer steps (default: --epochs)", sets=("max_steps",)),
        Option("epochs", POSITIVE, "N", "passes over the data (default: 1)", sets=("num_train_epochs",)),
        Option(
            "batch_size",
            COUNT,
            "B",
            "examples in a forward, on each device",
            8,
            sets=("per_device_train_batch_size", "per_device_eval_batch_size"),
        ),
        Option("gradient_accumulation", COUNT, "N", "forwards in a step", 1, sets=("gradient_accumulation_steps",)),
        Option("learning_rate", NOT_NEGATIVE, "RATE", "highest of the run, of AdamW", 1e-4, sets=("learning_rate",)),
        Option("warmup", NOT_NEGATIVE, "N", "steps in which the rate rises; below 1: a part of the run", 0.03),
        Option("schedule", one_of("cosine", "linear", "constant"), "NAME", "of the rate, after the warm-up", "cosine"),
        Option("weight_decay", NOT_NEGATIVE, "W", "of AdamW", 0.0, sets=("weight_decay",)),
        Option("seed", integer(0, 2**31 - 1), "N", "of the order of the data, dropout, LoRA and sampling", 0, sets=("seed",)),
        Option(
            "save_steps",
            COUNT,
            "N",
            "steps between checkpoints, of which the last is kept (default: a tenth of the run)",
            sets=("save_steps",),
        ),
        Option(
            "eval_steps",
            COUNT,
            "N",
            "steps between evaluations (default: only before the first step and after the last)",
            sets=("eval_steps",),
        ),
        Option("logging_steps", COUNT, "N", "steps between reports of the loss", 10, sets=("logging_steps",)),
        Option(
            "report_to", TEXT, "NAME[,NAME]", "send the log to tensorboard, wandb or what else transformers knows, or all", "none"
        ),
    ),
}
BY_NAME = {option.name: option for group in OPTIONS.values() for option in group}
REQUIRED = ("teacher", "student", "out", "method")
# the first of a pair that is given on the command line stands against the other from a file
EXCLUDING = (("steps", "epochs"), ("eval_data", "eval_fraction"))
# may differ between a run and its resumption, without a difference to the student
FREE = ("out", "save_steps", "logging_steps", "report_to", "memory_budget")
