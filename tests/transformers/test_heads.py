"""Hidden states and heads of real models, tiny and made from their configurations: nothing is downloaded."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import README, oracle
from tests.support.cases import InsideOperators
from tests.support.hidden import as_close, assert_same_training, logits_by
from tests.support.oracle import Options
from tests.support.processes import run_apart
from tests.transformers.test_verification import doctored

transformers = pytest.importorskip("transformers")
from kdkernels.transformers import hidden_states, lm_head, verify_lm_head  # noqa: E402  (needs nothing installed, but is of no use)
from tests.support.tiny_models import HEADS, MODELS, TOKENS, VOCAB, WIDTH, batch, build, config, labels, model_class  # noqa: E402

# peft on LoRA of a tied head, which is meant here
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


@pytest.mark.parametrize("name", MODELS)
def test_head_of_hidden_states_is_the_models_logits(name: str) -> None:
    model, inputs = build(name), batch()
    exact = copy.deepcopy(model).double()(**inputs).logits
    head, hidden = lm_head(model), hidden_states(model, inputs)
    as_close(logits_by(head, hidden), model(**inputs).logits, exact)
    expected = {"logit_scale": 1.0, "softcap": None, **HEADS.get(name, {})}
    assert (head.logit_scale, head.softcap) == (expected["logit_scale"], expected["softcap"])
    assert head.weight is model.get_output_embeddings().weight
    assert head.bias is getattr(model.get_output_embeddings(), "bias", None)
    assert (head.bias is not None) == (name in ("phi", "gptj", "modernbert_decoder"))
    assert vars(model.get_output_embeddings()).get("forward") is None


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model = build(name)
    found = assert_same_training(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


class LargestMade(InsideOperators):
    """The most entries of a tensor made, and of one as wide as the vocabulary."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.entries, self.of_logits = vocab, 0, 0

    def after(self, name: str, made: Any) -> None:
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
                if tensor.dim() > 2 and tensor.shape[-1] == self.vocab:
                    self.of_logits = max(self.of_logits, tensor.numel())


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2", "minicpm3"])
def test_hidden_states_make_no_logits(name: str) -> None:
    vocab = 509  # more than anything else in the model is wide
    model, inputs = build(name, vocab_size=vocab), batch(tokens=(2, 31), vocab=vocab)
    logits = inputs["input_ids"].numel() * vocab
    with LargestMade(vocab) as made:
        model(**inputs)
    assert made.of_logits == logits, "the count does not see the logits"
    with LargestMade(vocab) as made:
        hidden_states(model, {**inputs, "labels": inputs["input_ids"]})
    assert made.of_logits == 0
    assert made.entries < logits


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_autocast_casts_no_head_for_hidden_states(name: str) -> None:
    vocab, inputs = 509, batch(vocab=509)
    model = build(name, vocab_size=vocab)
    casts: list[Any] = []

    class Casts(InsideOperators):
        def after(self, name: str, made: Any) -> None:
            if name == "aten::_to_copy" and made.shape == (vocab, WIDTH):
                casts.append(made.dtype)

    with torch.autocast("cpu", torch.bfloat16), Casts():
        hidden = hidden_states(model, inputs)
        assert not casts
        expected = model(**inputs).logits
        assert casts == [torch.bfloat16]
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_by(lm_head(model), hidden)
    torch.testing.assert_close(found, expected, atol=2e-2 * expected.abs().max().item(), rtol=2e-2)


def test_a_head_that_accelerate_has_hooked() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llama")
    expected = hidden_states(model, batch())
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    forward = vars(model.lm_head)["forward"]
    assert torch.equal(hidden_states(model, batch()), expected)
    assert vars(model.lm_head)["forward"] is forward
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states(model, batch())
    verify_lm_head(model)


def test_weights_that_are_not_here_are_refused() -> None:
    with torch.device("meta"):
        model = model_class("llama")(config("llama"))
    with pytest.raises(ValueError, match="meta device"):
        lm_head(model)
    model = build("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised .torch.float8_e4m3fn"):
        lm_head(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"shape .5,., a shard"):
        lm_head(model)


def test_labels_are_not_given_to_the_model(llama: Any) -> None:
    inputs = batch()
    more = {**inputs, "labels": inputs["input_ids"], "num_items_in_batch": 3}
    assert torch.equal(hidden_states(llama, more), hidden_states(llama, inputs))
    assert "labels" in more
    alone = {"input_ids": inputs["input_ids"]}
    assert torch.equal(hidden_states(llama, inputs["input_ids"]), hidden_states(llama, alone))


def test_positions_are_chosen_as_for_logits(llama: Any) -> None:
    inputs = batch()
    every = hidden_states(llama, inputs)
    assert torch.equal(hidden_states(llama, {**inputs, "logits_to_keep": 3}), every[:, -3:])
    keep = torch.tensor([0, 4])
    assert torch.equal(hidden_states(llama, {**inputs, "logits_to_keep": keep}), every[:, keep])


def test_a_cache_is_only_kept_when_asked_for(llama: Any) -> None:
    caches = []
    handle = llama.model.register_forward_hook(lambda _, __, output: caches.append(output.past_key_values))
    hidden_states(llama, batch())
    hidden_states(llama, {**batch(), "use_cache": True})
    handle.remove()
    assert caches[0] is None
    assert caches[1] is not None


def test_gradient_checkpointing() -> None:
    model = build("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_training(model)


def test_what_a_forward_raises_leaves_the_model_as_it_was(llama: Any) -> None:
    before = {name: dict(vars(module)) for name, module in llama.named_modules()}
    inputs = batch()
    expected = llama(**inputs).logits

    def fail(*_: Any) -> None:
        raise KeyError("in the forward")

    for module in (llama.model.layers[1], llama.lm_head):
        handle = module.register_forward_hook(fail)
        with pytest.raises(KeyError, match="in the forward"):
            hidden_states(llama, inputs)
        handle.remove()
    assert {name: dict(vars(module)) for name, module in llama.named_modules()} == before
    assert torch.equal(llama(**inputs).logits, expected)


def test_a_call_within_a_call_gets_its_own(llama: Any) -> None:
    inputs, inner = batch(), []

    def call(*_: Any) -> None:
        handle.remove()
        inner.append(hidden_states(llama, batch(2)))

    handle = llama.model.register_forward_hook(call)
    outer = hidden_states(llama, inputs)
    assert torch.equal(outer, hidden_states(llama, inputs))
    assert torch.equal(inner[0], hidden_states(llama, batch(2)))


def test_hooks_of_the_head_run(llama: Any) -> None:
    handle = llama.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    doubled = hidden_states(llama, batch())
    handle.remove()
    assert torch.equal(doubled, 2 * hidden_states(llama, batch()))


def test_a_forward_that_does_not_call_its_head_is_refused() -> None:
    class Fused(transformers.LlamaForCausalLM):  # type: ignore[name-defined,misc]
        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    with pytest.raises(RuntimeError, match=r"called its output head .Linear. 0 times"):
        hidden_states(build("llama", Fused), batch())
    with pytest.raises(ValueError, match="did not call its output head"):
        verify_lm_head(build("llama", Fused))


def test_compiled_models_are_compiled_once_for_hidden_states_and_once_for_logits() -> None:
    model, inputs = build("llama"), batch()
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    expected = hidden_states(model, inputs)
    with torch.no_grad():
        for _ in range(3):
            assert compiled(**inputs, use_cache=False).logits.shape[-2:] == (TOKENS[1], VOCAB)
            assert torch.equal(hidden_states(compiled, inputs), expected)
    assert len(graphs) == 2
    verify_lm_head(compiled)
    assert len(graphs) == 2
    assert lm_head(compiled).weight is model.lm_head.weight


def test_gradients_through_a_compiled_model() -> None:
    torch.compiler.reset()
    model = build("gemma2")
    assert_same_training(torch.compile(model, backend="aot_eager"), model)


DISTRIBUTED = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from kdkernels.transformers.heads import unwrapped
import sys
import pytest
import torch
from kdkernels.transformers import hidden_states, verify_lm_head
from tests.support.hidden import adapted, fused_loss, gradients
from tests.support.tiny_models import batch, build

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)


def check(kind, model, wrapped):
    if kind == "fsdp":
        for layer in unwrapped(wrapped).model.layers:
            fully_shard(layer)
        fully_shard(wrapped)
    else:
        wrapped = DistributedDataParallel(wrapped, find_unused_parameters=kind == "find unused")
    each = [gradients(model, fused_loss(model, batch(seed))) for seed in (0, 1)]
    for _ in range(2):  # DDP refuses the second step where the first left a parameter unreduced
        found = gradients(wrapped, fused_loss(wrapped, batch(rank)))
        assert [name.removeprefix("module.") for name in found] == list(each[0])
        for gradient, *both in zip(found.values(), *(gradients.values() for gradients in each)):
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(gradient, sum(both) / 2)
    verify_lm_head(wrapped)


for kind in ("ddp", "find unused", "fsdp"):
    for name in ("phi", "llama_tied"):
        check(kind, build(name), build(name))
    check(kind, *(adapted(build("llama"), target_modules=["q_proj", "lm_head"]) for _ in range(2)))
with pytest.raises(ValueError, match="static_graph=True.*accepted: without"):
    hidden_states(DistributedDataParallel(build("llama"), static_graph=True), batch())
dist.destroy_process_group()
"""


def test_gradients_under_ddp_and_fsdp_are_the_mean_over_processes(tmp_path: Any) -> None:
    run_apart(DISTRIBUTED, *([str(rank), str(tmp_path / "store")] for rank in (0, 1)))


def test_data_parallel_is_refused(llama: Any) -> None:
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        hidden_states(nn.DataParallel(llama), batch())


# what a head may not be


def test_a_scale_of_unknown_use_is_refused() -> None:
    model = build("llama")
    model.config.logits_scaling = 2.0
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .llama. has logits_scaling = 2"):
        lm_head(model)
    model.config.logits_scaling = 1.0
    lm_head(model)


def test_heads_that_are_not_linear_are_refused() -> None:
    class Normalised(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, nn.functional.normalize(self.weight))

    model = build("llama")
    model.lm_head = Normalised(WIDTH, VOCAB, bias=False)
    with pytest.raises(ValueError, match="Normalised"):
        lm_head(model)
    model.lm_head = nn.Sequential(nn.Linear(WIDTH, VOCAB))
    with pytest.raises(ValueError, match="Sequential"):
        lm_head(model)
    with pytest.raises(ValueError, match="has no output head"):
        lm_head(model.model)
    with pytest.raises(TypeError, match="got str"):
        lm_head("llama")
    with pytest.raises(TypeError, match="got list"):
        hidden_states(build("llama"), [1, 2])


def test_padded_rows_may_be_cut_off_by_the_model() -> None:
    verify_lm_head(doctored("gemma2", lambda x: x[..., : VOCAB - 5]))


def test_the_library_does_not_import_transformers() -> None:
    code = "import sys, kdkernels; assert not {'transformers', 'peft', 'kdkernels.transformers'} & sys.modules.keys()"
    run_apart(code)


def test_the_readme_counts_the_families_and_a_page_names_them() -> None:
    families = sorted({family for family, _ in MODELS.values()})
    assert " ".join(README.read_text().split()).count(f"go through {len(families)} model families") == 1
    page = " ".join((README.parent / "docs" / "losses.md").read_text().split())
    assert f"Families that the tests go through: {', '.join(families)}." in page


def test_the_step_that_the_readme_shows_is_that_of_the_models_own_logits() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "hidden_states(student, batch)" in block)
    student, teacher = build("gemma2"), build("llama", seed=1)
    inputs = batch()
    scope = {"student": student, "teacher": teacher, "batch": {**inputs, "labels": inputs["input_ids"]}}
    exec(block, scope)
    targets = labels(inputs)
    x, z = student(**inputs, use_cache=False).logits, teacher(**inputs, use_cache=False).logits
    expected = oracle.mean(oracle.losses(x, z, targets, None, Options()), targets, None, Options())
    torch.testing.assert_close(scope["loss"], expected)
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
