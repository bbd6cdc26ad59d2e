"""How models are named on the command line: the table, folders, the hub's cache, the hub, and whose tokens their heads hold."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels.cli import configs, main, models
from kdkernels.cli.configs import head_shape
from kdkernels.cli.models import HEADS, OWNERS, HeadShape


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and a hub that refuses at once."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def folder(at: Path, config: dict[str, Any], tokens: list[str] | None = None, added: dict[str, int] | None = None) -> Path:
    at.mkdir(parents=True, exist_ok=True)
    (at / "config.json").write_text(json.dumps(config))
    if tokens is not None:
        more = [{"content": token, "id": number} for token, number in (added or {}).items()]
        vocab = {token: at for at, token in enumerate(tokens)}
        (at / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": more}))
    return at


def cached(monkeypatch: pytest.MonkeyPatch, cache: Path, name: str, config: dict[str, Any]) -> None:
    model = cache / f"models--{name.replace('/', '--')}"
    folder(model / "snapshots" / "abc123", config)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))


LLAMA = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64}


class TestTable:
    def test_models_of_one_tokenizer_differ_in_padding_alone(self) -> None:
        sizes = defaultdict(set)
        for head in HEADS.values():
            sizes[head.tokenizer].add(head.vocab)
        for tokenizer, vocabularies in sizes.items():
            assert tokenizer
            assert max(vocabularies) - min(vocabularies) <= 128, tokenizer

    def test_no_two_entries_are_one_model_trained_on_in_two_ways(self) -> None:
        assert len({models.plain(name) for name in HEADS}) == len(HEADS) == len(OWNERS)

    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("Qwen/Qwen2.5-0.5B", (151_936, 896)),
            ("Qwen/Qwen2.5-7B-Instruct", (152_064, 3584)),
            ("Qwen/Qwen2.5-Math-1.5B-Instruct", (151_936, 1536)),
            ("Qwen/Qwen2.5-14B-Instruct-1M", (152_064, 5120)),
            ("Qwen/Qwen3-4B-Thinking-2507", (151_936, 2560)),
            ("qwen/qwen3-30b-a3b", (151_936, 2048)),
            ("Qwen/Qwen3.5-9B", (248_320, 4096)),
            ("meta-llama/Meta-Llama-3.1-8B-Instruct", (128_256, 4096)),
            ("meta-llama/Llama-3.2-1B", (128_256, 2048)),
            ("meta-llama/Llama-4-Scout-17B-16E-Instruct", (202_048, 5120)),
            ("google/gemma-2-9b-it", (256_000, 3584)),
            ("google/gemma-3-4b-pt", (262_208, 2560)),
            ("google/gemma-4-31B-it", (262_144, 5376)),
            ("mistralai/Mistral-7B-Instruct-v0.3", (32_768, 4096)),
            ("mistralai/Mistral-Nemo-Instruct-2407", (131_072, 5120)),
            ("mistralai/Ministral-3-8B-Base-2512", (131_072, 4096)),
            ("microsoft/phi-4", (100_352, 5120)),
            ("microsoft/Phi-4-mini-instruct", (200_064, 3072)),
            ("HuggingFaceTB/SmolLM2-360M-Instruct", (49_152, 960)),
            ("HuggingFaceTB/SmolLM3-3B-Base", (128_256, 2048)),
            ("allenai/OLMo-2-1124-7B-Instruct", (100_352, 4096)),
            ("openai/gpt-oss-20b", (201_088, 2880)),
            ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", (152_064, 3584)),
            ("deepseek-ai/DeepSeek-V3-0324", (129_280, 7168)),
            ("zai-org/GLM-4.5-Air-Base", (151_552, 4096)),
            ("moonshotai/Kimi-K2-Instruct-0905", (163_840, 7168)),
            ("ibm-granite/granite-4.0-h-tiny", (100_352, 1536)),
            ("Qwen2.5-7B-Instruct", (152_064, 3584)),
        ],
    )
    def test_a_name_of_the_hub_means_the_model_of_the_table_however_it_was_trained_on(
        self, name: str, sizes: tuple[int, int]
    ) -> None:
        found = head_shape(name)
        assert (found.vocab, found.dim) == sizes
        assert found.name == name
        assert found.tokenizer

    def test_what_another_owner_publishes_under_that_name_is_not_taken_for_it(self) -> None:
        with pytest.raises(ValueError, match=r"cannot be reached; if its head is that of Llama-3.2-1B, give that name"):
            head_shape("someone/Llama-3.2-1B")


class TestFolders:
    @pytest.mark.parametrize(
        ("config", "sizes"),
        [
            (LLAMA, (1000, 64)),
            ({"model_type": "gpt2", "vocab_size": 50_257, "n_embd": 768}, (50_257, 768)),
            ({"model_type": "any", "text_config": {"vocab_size": 300, "hidden_size": 32}, "vocab_size": 7}, (300, 32)),
            ({"model_type": "internvl", "llm_config": {"vocab_size": 300, "hidden_size": 32}}, (300, 32)),
            ({"model_type": "opt", "vocab_size": 50_272, "hidden_size": 1024, "word_embed_proj_dim": 512}, (50_272, 512)),
        ],
    )
    def test_the_head_is_that_of_config_json(self, tmp_path: Path, config: dict[str, Any], sizes: tuple[int, int]) -> None:
        assert head_shape(str(folder(tmp_path / "model", config))) == HeadShape(*sizes)

    def test_what_a_config_json_leaves_out_is_the_default_of_transformers(self, tmp_path: Path) -> None:
        """As Gemma 3's from 4B on leave out the vocabulary."""
        config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}}
        assert head_shape(str(folder(tmp_path, config))) == HEADS["Gemma-3-4B"]
        with pytest.raises(ValueError, match="names no vocab_size"):
            head_shape(str(folder(tmp_path, {"model_type": "of nobody", "hidden_size": 64})))

    def test_a_model_that_transformers_saved_is_read(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        transformers.LlamaConfig(vocab_size=77, hidden_size=48, num_attention_heads=2).save_pretrained(tmp_path)
        assert head_shape(str(tmp_path)) == HeadShape(77, 48)

    def test_an_adapter_has_the_head_of_its_base(self, tmp_path: Path) -> None:
        base = folder(tmp_path / "base", LLAMA)
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        assert head_shape(str(tmp_path / "adapter")) == HeadShape(1000, 64)

    def test_a_folder_comes_before_a_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        folder(tmp_path / "Qwen2.5-0.5B", LLAMA)
        assert head_shape("Qwen2.5-0.5B") == HeadShape(1000, 64)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("{", "cannot be read"),
            ("[]", "holds no names"),
            (json.dumps({**LLAMA, "vocab_size": 0}), "vocab_size 0; accepted"),
            (json.dumps({**LLAMA, "hidden_size": "64"}), "hidden_size '64'; accepted"),
            (json.dumps({**LLAMA, "is_encoder_decoder": True}), "encoder-decoder"),
        ],
    )
    def test_a_config_json_that_describes_no_head_is_refused(self, tmp_path: Path, content: str, said: str) -> None:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            head_shape(str(tmp_path))

    def test_what_holds_no_model_says_where_one_is(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"holds no config\.json$"):
            head_shape(str(tmp_path))
        folder(tmp_path / "student", LLAMA)
        with pytest.raises(ValueError, match=r"holds no config\.json; .*/student does"):
            head_shape(str(tmp_path))
        (tmp_path / "kdkernels-cache.json").touch()
        with pytest.raises(ValueError, match="cache of log-probabilities"):
            head_shape(str(tmp_path))
        for path, said in (("./nothing", "no such folder"), (str(tmp_path / "kdkernels-cache.json"), "a file")):
            with pytest.raises(ValueError, match=said):
                head_shape(path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine that has one model, and what it was asked for."""
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps(LLAMA).encode() if self.path == "/new/model/resolve/main/config.json" else b"<html>"
            self.send_response(200 if b"{" in body else 401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield asked
        server.shutdown()


class TestHub:
    def test_the_cache_of_this_machine_is_read_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[str]) -> None:
        cached(monkeypatch, tmp_path / "cache", "Qwen/Qwen2.5-0.5B", {**LLAMA, "vocab_size": 1234})
        assert head_shape("Qwen/Qwen2.5-0.5B") == HeadShape(1234, 64)
        cached(monkeypatch, tmp_path / "cache", "new/model", LLAMA)
        assert head_shape("new/model") == HeadShape(1000, 64)
        assert hub == []

    def test_the_cache_is_where_the_hub_library_has_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cached(monkeypatch, tmp_path / "home" / "hub", "new/model", LLAMA)
        monkeypatch.delenv("HF_HUB_CACHE")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        assert head_shape("new/model") == HeadShape(1000, 64)

    def test_what_is_not_there_is_fetched(self, hub: list[str]) -> None:
        assert head_shape("new/model") == HeadShape(1000, 64)
        assert hub == ["/new/model/resolve/main/config.json"]

    def test_a_model_that_the_hub_does_not_give_is_an_error_that_says_so(self, hub: list[str]) -> None:
        with pytest.raises(ValueError, match=r"'new/other': the hub gives no config\.json of it \(status 401"):
            head_shape("new/other")
        assert len(hub) == 1

    def test_models_of_the_table_and_paths_are_not_asked_for(self, hub: list[str]) -> None:
        head_shape("Qwen/Qwen3-8B")
        for path in ("./nothing", "a/b/c", "12x", "0x8", "151936", "-1x896", "a folder"):
            with pytest.raises(ValueError, match="VxD such as"):
                head_shape(path)
        assert hub == []

    def test_a_hub_that_does_not_answer_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(configs, "PATIENCE", 0.2)
        monkeypatch.setattr(configs.urllib.request, "urlopen", lambda *_, **__: time.sleep(3))
        begin = time.monotonic()
        with pytest.raises(ValueError, match="the hub cannot be reached"):
            head_shape("new/model")
        assert time.monotonic() - begin < 2

    def test_offline_it_is_not_asked(self, monkeypatch: pytest.MonkeyPatch, hub: list[str]) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
            head_shape("new/model")
        assert hub == []


class TestTokenizers:
    def plan(self, student: str | Path, teacher: str | Path, *more: str) -> int:
        return main(["plan", f"--student={student}", f"--teacher={teacher}", "--tokens=64", *more])

    @pytest.mark.parametrize(
        ("student", "teacher"),
        [("Llama-3.2-1B", "Qwen2.5-7B"), ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B"), ("SmolLM2-135M", "Gemma-3-1B")],
    )
    def test_a_plan_between_two_tokenizers_is_refused(self, capsys: pytest.CaptureFixture[str], student: str, teacher: str) -> None:
        assert self.plan(student, teacher) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --student {student} cannot learn from --teacher {teacher}: the tokenizers differ")
        assert "one vocabulary" in line
        sizes = line.split("all the same: ")[1].split()
        assert self.plan(sizes[1], sizes[3]) == 0, "and what it names as the way out is one"

    def test_what_is_of_one_tokenizer_is_planned(self, capsys: pytest.CaptureFixture[str]) -> None:
        for student, teacher in (
            ("Qwen2.5-0.5B", "Qwen3-8B"),
            ("Qwen3-0.6B", "DeepSeek-R1-Distill-Qwen-7B"),
            ("Llama-3.2-1B", "meta-llama/Llama-3.3-70B-Instruct"),
            ("Qwen2.5-0.5B", "151936x4096"),
        ):
            assert self.plan(student, teacher) == 0
        assert "not compared" not in capsys.readouterr().out

    def test_folders_are_compared_token_by_token(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [f"w{number}" for number in range(1000)]
        student = folder(tmp_path / "student", LLAMA, words)
        longer = folder(tmp_path / "longer", {**LLAMA, "hidden_size": 128}, words, {"<more>": 1000})
        other = folder(tmp_path / "other", {**LLAMA, "hidden_size": 128}, words[::-1])
        silent = folder(tmp_path / "silent", {**LLAMA, "hidden_size": 128})
        assert self.plan(student, longer) == 0
        assert "not compared" not in capsys.readouterr().out
        assert self.plan(student, silent) == 0
        assert "tokenizers: not compared" in capsys.readouterr().out
        assert self.plan(student, other) == 2
        assert "disagree on 1,000 of their tokens" in capsys.readouterr().err

    def test_tokens_of_other_names_are_planned_with_a_vocab_size_as_they_are_distilled(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [f"w{number}" for number in range(1000)]
        student = folder(tmp_path / "student", LLAMA, words)
        renamed = folder(tmp_path / "renamed", LLAMA, [*words[:998], "<think>", "</think>"])
        assert self.plan(student, renamed) == 2
        assert "vocab_size" in capsys.readouterr().err
        assert self.plan(student, renamed, "--vocab-size=1000") == 0
        capsys.readouterr()
        assert self.plan(student, renamed, "--vocab-size=998", "--json") == 0
        assert json.loads(capsys.readouterr().out)["inputs"]["vocab_size"] == 998
        assert self.plan(student, renamed, "--vocab-size=1001") == 2
        assert "--vocab-size is 1,001; accepted: up to 1,000" in capsys.readouterr().err

    def test_a_tokenizer_of_transformers_is_read_as_it_reads_itself(self, tmp_path: Path) -> None:
        transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
        for model in (tokenizers.models.WordLevel({"a": 0, "b": 1}), tokenizers.models.Unigram([("a", 0.0), ("b", -1.0)])):
            one = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), pad_token="<pad>")
            one.save_pretrained(tmp_path)
            found = configs.vocabulary(tmp_path)
            assert found is not None
            assert found.get_vocab() == one.get_vocab()

    def test_json_holds_the_inputs_and_the_figures_of_each_way(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.plan("Qwen2.5-0.5B", "Qwen2.5-7B", "--json", "--memory-budget=512MiB", "--device=l40s", "--dtype=float16") == 0
        shown = json.loads(capsys.readouterr().out)
        inputs = shown["inputs"]
        assert inputs["student"] == {"name": "Qwen2.5-0.5B", "vocab": 151_936, "hidden": 896, "tokenizer": "Qwen2"}
        assert inputs["teacher"]["hidden"] == 3584
        assert inputs["vocab_size"] == 151_936
        assert inputs["memory_budget"] == 512 * 2**20
        assert (inputs["tokens"], inputs["dtype"], inputs["device"], inputs["one_tokenizer"]) == (64, "float16", "L40S", True)
        assert list(shown["predicted"]) == ["eager", "tokens", "vocab"]
        for strategy in ("tokens", "vocab"):
            planned = kd.plan(
                *(64, 151_936, 896, 3584),
                torch.float16,
                device="L40S",
                strategy=strategy,
                memory_budget=512 * 2**20,
            )
            found = shown["predicted"][strategy]
            assert (found["peak_bytes"], found["seconds"], found["flops"]) == (planned.peak_bytes, planned.seconds, planned.flops)
            assert found["fits"] is True
        assert self.plan("32000x64", "32000x64", "--json", "--device=H100") == 0
        assert json.loads(capsys.readouterr().out)["inputs"]["one_tokenizer"] is None
