"""Bad arguments of the losses, with the error and the words of its message that each has to give."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends.products import HeadProducts
from tests.support.cases import draw

TOKENS, VOCAB, STUDENT, TEACHER = 6, 37, 8, 12
CASE = draw(tokens=(TOKENS,), vocab=VOCAB, dims=(STUDENT, TEACHER))
LABELS = torch.arange(TOKENS)


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any product or row operation is a failure, and not one of the expected kind."""

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done before the input was checked")

    monkeypatch.setattr(HeadProducts, "logits", work)
    monkeypatch.setattr(backends, "operators_of_loss", work)


def refused(error: type[Exception], *words: str) -> Any:
    """All of the words, in this order, in the message."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


# What is wrong, the error, and the words of its message; for both public functions.
OPTIONS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"divergence": "kl"}, ValueError, ("divergence", "'kl'", "forward_kl")),
    ({"divergence": "forwardkl"}, ValueError, ("divergence", "'forwardkl'", "accepted", "the nearest is forward_kl")),
    ({"divergence": 1}, TypeError, ("divergence", "int")),
    ({"divergence": kd.jsd}, TypeError, ("divergence", "did you mean jsd()")),
    ({"t": 1.5}, ValueError, ("t is", "[0, 1]", "1.5")),
    ({"t": -0.1}, ValueError, ("t is", "[0, 1]", "-0.1")),
    ({"t": math.nan}, ValueError, ("t is", "[0, 1]", "nan")),
    ({"t": "half"}, TypeError, ("t is", "[0, 1]", "str")),
    ({"t": True}, TypeError, ("t is", "[0, 1]", "bool")),
    ({"t": torch.ones(2)}, ValueError, ("t is", "0-dim", "(2,)")),
    ({"t": torch.tensor(1)}, ValueError, ("t is", "float", "int64")),
    ({"temperature": 0.0}, ValueError, ("temperature", "positive", "0.0")),
    ({"temperature": 1.1e5}, ValueError, ("temperature", "positive", "1e-9 to 1e5", "110000.0")),
    ({"temperature": -1}, ValueError, ("temperature", "positive", "-1")),
    ({"temperature": math.inf}, ValueError, ("temperature", "positive", "inf")),
    ({"temperature": math.nan}, ValueError, ("temperature", "positive", "nan")),
    ({"temperature": "2"}, TypeError, ("temperature", "positive", "str")),
    ({"temperature": torch.tensor(2.0)}, TypeError, ("temperature", "Tensor")),
    ({"t": torch.tensor(0.5, requires_grad=True)}, ValueError, ("t requires grad", "constant", "t.detach()")),
    ({"t": np.float32(1.5)}, ValueError, ("t is", "[0, 1]", "1.5")),
    ({"temperature": np.bool_(True)}, TypeError, ("temperature", "positive", "bool")),
    ({"kd_weight": np.ones(1)}, TypeError, ("kd_weight", "number", "ndarray")),
    ({"ignore_index": np.float64(1)}, TypeError, ("ignore_index", "integer", "float64")),
    ({"return_metrics": 1}, TypeError, ("return_metrics", "True or False", "int")),
    ({"square_temperature": np.int64(1)}, TypeError, ("square_temperature", "True or False", "int64")),
    ({"labels": "jsd"}, TypeError, ("labels", "tensor", "str")),
    ({"divergence": kd.Divergence("jsd", kd.jsd().pair, "0.5")}, ValueError, ("'jsd'", "parameter 0.5", "(0, 1)")),  # type: ignore[arg-type]
    ({"kd_weight": -1.0}, ValueError, ("kd_weight", "at least 0", "-1.0")),
    ({"kd_weight": None}, TypeError, ("kd_weight", "NoneType")),
    ({"ce_weight": -1.0, "labels": LABELS}, ValueError, ("ce_weight", "at least 0", "-1.0")),
    ({"ce_weight": math.inf, "labels": LABELS}, ValueError, ("ce_weight", "inf")),
    ({"ce_weight": 0.5}, ValueError, ("labels is None", "ce_weight=0.5")),
    ({"ignore_index": 1.0}, TypeError, ("ignore_index", "integer", "float")),
    ({"labels": [1, 2]}, TypeError, ("labels", "tensor", "list")),
    ({"labels": LABELS.float()}, TypeError, ("labels", "float32", "integers")),
    ({"labels": LABELS > 2}, TypeError, ("labels", "bool", "integers")),
    ({"labels": LABELS[:-1]}, ValueError, ("labels", "(5,)", "(6,)")),
    ({"labels": LABELS[:, None]}, ValueError, ("labels", "(6, 1)", "(6,)")),
    ({"labels": LABELS.to("meta")}, ValueError, ("labels", "meta", "cpu")),
    ({"labels": LABELS + VOCAB}, ValueError, ("labels", str(VOCAB + TOKENS - 1), f"0 to {VOCAB - 1}", "ignore_index=-100")),
    ({"labels": LABELS - 3}, ValueError, ("labels", "-3", f"0 to {VOCAB - 1}", "ignore_index=-100")),
    ({"labels": LABELS.clone().fill_(-100), "ignore_index": 7}, ValueError, ("labels", "-100", "ignore_index=7")),
    ({"token_weight": 2.0}, TypeError, ("token_weight", "tensor", "float")),
    ({"token_weight": LABELS}, TypeError, ("token_weight", "int64", "float32")),
    ({"token_weight": LABELS > 2}, TypeError, ("token_weight", "bool", "float32", "token_weight.to(torch.float32)")),
    ({"token_weight": torch.ones(5)}, ValueError, ("token_weight", "(5,)", "(6,)")),
    ({"token_weight": torch.ones(6, device="meta")}, ValueError, ("token_weight", "meta", "cpu")),
    ({"token_weight": torch.ones(6).requires_grad_()}, ValueError, ("token_weight", "requires grad", "detach")),
    ({"reduction": "batchmean"}, ValueError, ("reduction", "'batchmean'", "mean, sum, none")),
    ({"reduction": None}, ValueError, ("reduction", "None", "mean, sum, none")),
    ({"normalizer": 0}, ValueError, ("normalizer", "positive", "0")),
    ({"normalizer": -3.0}, ValueError, ("normalizer", "positive", "-3.0")),
    ({"normalizer": "all"}, TypeError, ("normalizer", "positive", "str")),
    ({"normalizer": torch.ones(2)}, ValueError, ("normalizer", "0-dim", "(2,)")),
    ({"normalizer": torch.tensor(2.0, requires_grad=True)}, ValueError, ("normalizer requires grad", "normalizer.detach()")),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, ("normalizer", "'mean'", "'sum'")),
    ({"normalizer": 3, "reduction": "none"}, ValueError, ("normalizer", "'mean'", "'none'")),
]


def head(model: str, **parts: Any) -> dict[str, Any]:
    weight = CASE.student_weight if model == "student" else CASE.teacher_weight
    return {f"{model}_head": kd.LMHead(**{"weight": weight, **parts})}


def quantised() -> Any:
    with warnings.catch_warnings():  # torch.ao is deprecated, and still what people have
        warnings.simplefilter("ignore")
        model = torch.nn.Sequential(torch.nn.Linear(8, 37))
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)[0]


QUANTISED = quantised()
LINEAR: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"student_hidden": [1.0]}, TypeError, ("student_hidden", "tensor", "list")),
    ({"student_hidden": CASE.student_hidden.long()}, TypeError, ("student_hidden", "int64", "float32", "bfloat16")),
    ({"teacher_hidden": CASE.teacher_hidden.cfloat()}, TypeError, ("teacher_hidden", "complex64", "float32")),
    ({"teacher_hidden": CASE.teacher_hidden.to("meta")}, ValueError, ("teacher_hidden", "meta", "cpu")),
    ({"student_hidden": CASE.student_hidden[:, :-1]}, ValueError, ("student_hidden", "(6, 7)", "(37, 8)", "D = 8")),
    ({"teacher_hidden": CASE.teacher_hidden[:, :-1]}, ValueError, ("teacher_hidden", "(6, 11)", "(37, 12)", "D = 12")),
    ({"teacher_hidden": CASE.teacher_hidden[:-1]}, ValueError, ("student_hidden (6, 8)", "teacher_hidden (5, 12)")),
    ({"teacher_hidden": CASE.teacher_hidden[None]}, ValueError, ("student_hidden (6, 8)", "teacher_hidden (1, 6, 12)")),
    ({"teacher_hidden": CASE.teacher_hidden.clone().requires_grad_()}, ValueError, ("teacher_hidden", "linear_okd_loss")),
    ({"student_head": "lm_head"}, TypeError, ("student_head", "LMHead", "str")),
    ({"student_head": torch.nn.Linear(8, 37)}, TypeError, ("student_head", "got Linear", "kd.LMHead(head.weight, head.bias)")),
    ({"teacher_head": torch.nn.Linear(8, 37, bias=False)}, TypeError, ("teacher_head", "got Linear", "pass head.weight")),
    ({"teacher_head": torch.nn.Embedding(8, 37)}, TypeError, ("teacher_head", "got Embedding", "pass head.weight")),
    (
        {"student_head": torch.nn.Sequential(torch.nn.Linear(8, 37))},
        TypeError,
        ("student_head", "got Sequential", "kdkernels.transformers.lm_head(model)"),
    ),
    ({"student_head": QUANTISED}, TypeError, ("student_head", "got Linear", "quantised", "head.weight().dequantize()")),
    ({"student_head": QUANTISED.weight}, TypeError, ("student_head", "got method", "head.weight().dequantize()")),
    ({"student_head": QUANTISED.weight()}, TypeError, ("student_head.weight", "qint8", "float32")),
    ({"teacher_head": None}, TypeError, ("teacher_head", "LMHead", "NoneType")),
    ({"student_head": CASE.student_weight[0]}, ValueError, ("student_head.weight", "(V, D)", "(8,)")),
    ({"student_head": CASE.student_weight[:0]}, ValueError, ("student_head.weight", "(V, D)", "(0, 8)")),
    ({"student_head": CASE.student_weight.int()}, TypeError, ("student_head.weight", "int32")),
    ({"student_head": CASE.student_weight.to("meta")}, ValueError, ("student_head.weight", "meta", "cpu")),
    ({"student_head": CASE.student_weight.double()}, TypeError, ("student_hidden and student_head", "float32", "float64")),
    ({"teacher_head": CASE.teacher_weight.half()}, TypeError, ("teacher_hidden and teacher_head", "float32", "float16")),
    (head("student", bias=torch.ones(36)), ValueError, ("student_head.bias", "(37,)", "(36,)")),
    (head("teacher", bias=torch.ones(37, 1)), ValueError, ("teacher_head.bias", "(37,)", "(37, 1)")),
    (head("student", bias=[0.0] * 37), TypeError, ("student_head.bias", "tensor", "list")),
    (head("student", bias=torch.ones(37, dtype=torch.int64)), TypeError, ("student_head.bias", "int64")),
    (head("student", bias=torch.ones(37, device="meta")), ValueError, ("student_head.bias", "meta", "cpu")),
    (head("student", logit_scale=0.0), ValueError, ("student_head.logit_scale", "positive", "0.0")),
    (head("teacher", logit_scale=-1.0), ValueError, ("teacher_head.logit_scale", "positive", "-1.0")),
    (head("teacher", logit_scale="1"), TypeError, ("teacher_head.logit_scale", "positive", "str")),
    (head("student", softcap=0.0), ValueError, ("student_head.softcap", "positive", "None", "0.0")),
    (head("teacher", softcap=-30.0), ValueError, ("teacher_head.softcap", "positive", "-30.0")),
    (head("teacher", softcap=math.inf), ValueError, ("teacher_head.softcap", "positive", "inf")),
    ({"teacher_head": torch.ones(40, 12)}, ValueError, ("student_head has 37", "teacher_head 40", "vocab_size")),
    ({"teacher_head": torch.ones(30, 12)}, ValueError, ("student_head has 37", "teacher_head 30", "vocab_size")),
    ({"vocab_size": 38}, ValueError, ("vocab_size=38", "1 to 37")),
    ({"vocab_size": 0}, ValueError, ("vocab_size=0", "1 to 37")),
    ({"vocab_size": 30.0}, TypeError, ("vocab_size", "integer", "float")),
    ({"vocab_size": True}, TypeError, ("vocab_size", "integer", "bool")),
    ({"vocab_size": 5, "labels": LABELS}, ValueError, ("labels", "holds 5", "0 to 4")),
    ({"strategy": "fast"}, ValueError, ("strategy", "'fast'", "auto, tokens")),
    ({"memory_budget": 0}, ValueError, ("memory_budget", "positive", "0")),
    ({"memory_budget": 1e6}, TypeError, ("memory_budget", "bytes", "float")),
    ({"memory_budget": True}, TypeError, ("memory_budget", "bytes", "bool")),
]
