"""Models and tokenizers in folders: how they are loaded, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

import transformers

from kdkernels.errors import CommandError
from kdkernels.transformers.load import load_model, load_tokenizer
from tests.support.data import tokenizer
from tests.support.tiny_models import build


def test_a_model_is_loaded_as_it_was_saved_or_in_the_dtype_asked_for(given: Path, tmp_path: Path) -> None:
    saved = build("llama").to(torch.bfloat16)
    saved.save_pretrained(tmp_path / "model")
    assert load_model(tmp_path / "model").dtype == torch.bfloat16
    found = load_model(str(tmp_path / "model"), dtype="float32")
    assert not found.training
    for name, tensor in saved.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.float())
    with pytest.raises(ValueError, match="dtype is one of auto, float32"):
        load_model(tmp_path / "model", dtype="int8")


def damage(folder: Path, what: str) -> None:
    """Spoil a folder of a model, a tokenizer with it."""
    file = folder / "config.json"
    about = json.loads(file.read_text())
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "half the weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif what == "no config":
        file.unlink()
    elif what == "broken config":
        file.write_text("{")
    elif what == "other sizes":
        file.write_text(json.dumps({**about, "intermediate_size": 99}))
    elif what == "another layer":
        file.write_text(json.dumps({**about, "num_hidden_layers": 3}))
    elif what == "unknown type":
        file.write_text(json.dumps({**about, "model_type": "wub"}))
    elif what == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("no weights", "no file named model.safetensors"),
        ("half the weights", "its weights are damaged"),
        ("no config", "the folder holds no config.json"),
        ("broken config", "not a valid JSON file"),
        ("other sizes", "its weights have other sizes than its config.json says"),
        ("another layer", "of the weights of LlamaForCausalLM are missing, model.layers.2."),
        ("unknown type", "model type `wub`"),
    ],
)
def test_a_damaged_folder_is_told_from_others_in_one_line(given: Path, tmp_path: Path, what: str, expected: str) -> None:
    shutil.copytree(given / "student", tmp_path / "model")
    damage(tmp_path / "model", what)
    with pytest.raises(CommandError) as raised:
        load_model(tmp_path / "model")
    assert str(raised.value).startswith(f"'{tmp_path / 'model'}' cannot be loaded: ")
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["student", "gpt2_student", "gemma2_student"])
def test_a_folder_without_a_tokenizer_is_not_given_an_empty_one(given: Path, tmp_path: Path, family: str) -> None:
    shutil.copytree(given / family, tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").get_vocab() == tokenizer().get_vocab()
    damage(tmp_path / "model", "no tokenizer")
    with pytest.raises(CommandError, match="it has no tokenizer"):
        load_tokenizer(tmp_path / "model")


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 10, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**small, initializer_range=0.4))  # that attention counts
    translator = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=10, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    )
    headless = transformers.LlamaModel(build("llama").config)
    for name, model, expected in (
        ("bert", masked, "lets a token see the tokens after it"),
        ("t5", translator, "t5 models are not causal language models"),
        ("base", headless, "1 of the weights of LlamaForCausalLM are missing, lm_head.weight"),
    ):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(CommandError, match=expected):
            load_model(tmp_path / name)


def test_a_causal_model_whose_configuration_says_it_is_no_decoder_is_loaded(tmp_path: Path) -> None:
    model = build("gpt_neox")
    assert model.config.is_decoder is False
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)).__name__ == "GPTNeoXForCausalLM"


def test_an_adapter_is_loaded_on_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    build("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "adapter")(ids).logits, adapted.eval()(ids).logits)


@pytest.mark.parametrize("name", ["/nowhere", "./gone", "a/b/c", "two words", ""])
def test_a_name_that_can_only_be_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(CommandError, match="there is no such folder"):
            load(name)


def test_a_file_and_a_name_that_cannot_be_asked_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for load in (load_model, load_tokenizer):
        with pytest.raises(CommandError, match="a file; accepted: a folder"):
            load(tmp_path / "weights.bin")
        with pytest.raises(CommandError, match="neither a folder nor in the hub's cache here, and the hub cannot be reached"):
            load("owner/gone")
