"""What a language model is judged by in benchmarks.methods: on held-out text, and by how it goes on from held-out prompts.

In plain PyTorch, which shares no code with the losses under test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.demo import samples
from kdkernels.demo.corpus import Corpus
from kdkernels.demo.models import Model, hidden_states, mean_and_error
from kdkernels.demo.settings import Settings

BINS = 15


@torch.no_grad()
def held_out(model: Model, inputs: Tensor, labels: Tensor) -> dict[str, float]:
    """Of windows (windows, window): loss in nats per token with its standard error over windows, next-token accuracy, and ece."""
    model.eval()
    losses, hits, confidences = [], [], []
    for x, y in zip(inputs.split(2), labels.split(2), strict=True):
        logprobs = (hidden_states(model, x) @ model.lm_head.weight.T).log_softmax(-1)
        losses.append(torch.nn.functional.nll_loss(logprobs.mT, y, reduction="none").mean(1))
        best = logprobs.max(-1)
        hits.append((best.indices == y).flatten())
        confidences.append(best.values.exp().flatten())
    loss, error = mean_and_error(torch.cat(losses))
    hit = torch.cat(hits)
    ece = calibration_error(torch.cat(confidences), hit)
    return {"loss": loss, "error": error, "accuracy": float(hit.double().mean()), "ece": ece}


def calibration_error(confidence: Tensor, hit: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: over bins of equal width, each weighed by its tokens, how far accuracy and confidence lie apart.

    confidence: (tokens,) probability of the most likely token. hit: (tokens,) bool, whether that was the next token.
    """
    bin_of = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    apart = torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, hit.double() - confidence.double())
    return float(apart.abs().sum()) / len(hit)


def judged(teacher: Model, prompts: Tensor, written: Tensor, true: Tensor) -> dict[str, float]:
    """Of continuations ``written`` (prompts, tokens): the teacher's loss on them in nats per token, ROUGE-L against ``true``,
    which is how the text itself goes on, and the share of distinct 3-grams."""
    return {
        "teacher_loss": float(samples.judge(teacher, prompts, written).double().mean()),
        "rouge_l": sum(map(rouge_l, written.tolist(), true.tolist())) / len(true),
        "distinct": samples.distinct(written, samples.LONGEST_NGRAM),
    }


def rouge_l(written: Sequence[int], true: Sequence[int]) -> float:
    """F-measure of the longest common subsequence (Lin 2004), of token ids: those of code keep what its words would leave out."""
    row = [0] * (len(true) + 1)  # longest common subsequence of the tokens so far and each beginning of ``true``
    for token in written:
        diagonal = 0
        for at, other in enumerate(true, 1):
            above = row[at]
            row[at] = diagonal + 1 if token == other else max(above, row[at - 1])
            diagonal = above
    return 2 * row[-1] / (len(written) + len(true))


class Judge:
    """Scores models on one text, which no training and no search has seen. test: its ``held_out`` gives the windows."""

    def __init__(self, settings: Settings, test: Corpus, teacher: Model) -> None:
        self.settings, self.teacher = settings, teacher
        self.windows = test.held_out(settings.heldout_windows, settings.window)
        whole, _ = test.held_out(settings.prompts, settings.prompt_tokens + settings.written_tokens)
        self.prompts, self.true = whole.split([settings.prompt_tokens, settings.written_tokens], dim=1)

    def scores(self, model: Model, seed: int) -> dict[str, float]:
        """seed: of what the model samples, at temperature 1."""
        written = samples.write(model, self.prompts, dataclasses.replace(self.settings, seed=seed))
        return {**held_out(model, *self.windows), **judged(self.teacher, self.prompts, written, self.true)}

    def text(self) -> dict[str, float]:
        """Of the text's own continuations."""
        return judged(self.teacher, self.prompts, self.true, self.true)
