"""Any config.json is a model or is refused in words, fast; the Hub answers within 5 s or is said not to."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

import huggingface_hub
import pytest
from pasting import packed, pasted, refused
from tiny import CONFIGS, LLAMA, ROOT

from peftlab import RunSpec, SpecError, cli, seam
from peftlab.base import architecture, configs, models
from peftlab.base.models import MODELS
from peftlab.bench import families


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The families' code is imported, so that what is timed is the work itself."""
    for config in CONFIGS.values():
        architecture.build(config)


@pytest.mark.parametrize("key", ["gemma-3-270m", "mixtral-8x7b", "gpt2", "opt-350m", "phi-3-mini", "t5-base"])
def test_a_pasted_config_counts_as_the_catalogues_own(key):
    own = MODELS[key]
    entry = pasted(own.config, _name_or_path="some/Where-7B", torch_dtype="bfloat16", quantization_config={"bits": 4})
    assert entry == models.find(entry.key) and entry.name == "Where-7B" and entry.is_causal == own.is_causal
    assert "quantization chosen here" in entry.note
    models._from_key.cache_clear()
    models._read.cache_clear()
    assert architecture.of(entry.key) == architecture.of(key)


def test_the_key_travels_in_a_link_and_from_a_visitor():
    page = pytest.importorskip("demos.page.address")
    spec = RunSpec(model=pasted(LLAMA).key)
    assert len(spec.model) < 400 and page.public(dict(parse_qsl(spec.to_query()))) == spec
    for model in ("config:../x", "config:", "config:" + "A" * 9000, "x" * 5000, f"{'x' * 5000}/y", "config:a/b"):
        with pytest.raises(SpecError, match="no such model"):
            page.public({"model": model})


def test_what_says_nothing_about_shapes_leaves_the_key_alone():
    noise = {
        "dtype": "float16", "torch_dtype": None, "transformers_version": "4.1", "eos_token_id": [1, 2], "bos_token_id": -1,
        "pad_token_id": 10**6, "auto_map": {"AutoConfig": "a--b.C"}, "temperature": 0.1, "_attn_implementation": "x/y",
        "attn_implementation": "kernels-community/flash-attn", "rope_scaling": None, "use_cache": True, "to_dict": 3,
    }  # fmt: skip
    assert pasted(LLAMA, **noise) == pasted(LLAMA)
    key = packed(json.dumps({**LLAMA, **noise, "_name_or_path": "<script>"}))  # a key that somebody made
    assert models.find(key).config == configs.normal(LLAMA) and models.find(key).name == "script"


def test_a_name_is_the_last_part_or_the_family():
    assert pasted(LLAMA).name == "llama from config.json"
    assert pasted(LLAMA, _name_or_path="C:\\models\\mine\\").name == "mine"
    assert pasted(LLAMA, _name_or_path="a/<b>\ud800x").name == "bx"
    assert pasted(LLAMA, _name_or_path=5).name == "llama from config.json"


def test_a_config_that_names_no_class_gets_its_familys():
    nameless = {name: value for name, value in LLAMA.items() if name != "architectures"}
    named = pasted(LLAMA)
    assert named.is_causal and named == pasted(nameless)
    assert named == pasted(LLAMA, architectures=["pipeline"]) == pasted(LLAMA, architectures=[])
    bert = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert pasted(bert).config["architectures"] == ["BertForMaskedLM"]


def test_null_is_kept_where_it_is_not_the_default():
    mistral = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    windows = [architecture.of(pasted(mistral, **given).key).facts.window for given in ({"sliding_window": None}, {})]
    assert windows == [0, 4096]


def test_of_a_multimodal_config_the_text_model_counts():
    text = {name: value for name, value in CONFIGS["gemma3"].items() if name not in ("architectures", "model_type")}
    vision = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"depth": 10**9}}
    entry = pasted(vision, model_type="gemma3", text_config=text)
    assert architecture.of(entry.key) == architecture.build(CONFIGS["gemma3"]) and entry.is_causal
    llava = {"model_type": "llava", "tie_word_embeddings": True, "text_config": {**LLAMA}}
    del llava["text_config"]["tie_word_embeddings"]
    assert architecture.of(pasted(llava).key) == architecture.build(CONFIGS["llama-tied"])


EVERY_FAMILY = [{"model_type": kind} for kind in ("bert", "xlm-roberta", "electra", "bart", "falcon", "deepseek_v3")]


@pytest.mark.parametrize("config", [*CONFIGS.values(), *EVERY_FAMILY], ids=lambda config: config["model_type"])
def test_every_family_counts_what_transformers_counts(config):
    model = configs.build_meta(config)  # a head may share its bias as well as its weight
    assert architecture.describe(model).total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "exaone", "t5gemma"])
def test_a_family_without_heads_of_anothers_class_or_of_two_stacks_is_built(kind):
    """exaone's fields are read by Llama's class; T5Gemma's stand in the config of its encoder and its decoder."""
    if not any(kind in families.kinds(task) for task in families.TASKS):
        pytest.skip("a newer transformers has it")
    config = families.tiny(kind)
    entry = pasted(config)
    model = configs.build_meta(entry.config)
    assert architecture.of(entry.key).total_parameters == sum(p.numel() for p in model.parameters()) > 0
    assert configs.stack(model.config).num_hidden_layers == families.LAYERS


@pytest.mark.parametrize("kind", ["prophetnet", "longcat_flash", "nemotron_h", "t5"])
def test_a_depth_may_be_a_number_of_another_name_or_a_list(kind):
    config = families.tiny(kind)
    assert pasted(config).config == configs.normal(config) and "num_hidden_layers" not in config
    depth = ["num_encoder_layers", "num_layers", "layers_block_type"]
    with pytest.raises(SpecError, match="num_hidden_layers is missing"):
        pasted({name: value for name, value in config.items() if name not in depth})


def test_the_default_sizes_that_transformers_leaves_out_of_a_part_are_read_as_such():
    """As llava-1.5's config.json on the Hub has it."""
    part = {"model_type": "llama", "vocab_size": 32064}
    entry = pasted({"model_type": "llava", "text_config": part})
    assert (entry.config["hidden_size"], entry.config["num_hidden_layers"]) == (4096, 32)
    assert models.find(entry.key) == entry
    for alone in (part, {"model_type": "llava", "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5}}):
        with pytest.raises(SpecError, match="hidden_size is missing"):
            pasted(alone)


def test_the_number_of_a_layer_may_be_counted_from_the_last():
    assert pasted(LLAMA, feature_layer=-2).config["feature_layer"] == -2


def test_infinite_numbers_are_read_as_transformers_writes_them():
    written = [0.0, {"__float__": "Infinity"}]
    entry = pasted(families.tiny("falcon_h1"), time_step_limit=written)
    assert entry.config["time_step_limit"] == [0.0, float("inf")]
    assert list(configs.parsed(entry.config)[0].time_step_limit) == [0.0, float("inf")]


def test_a_model_that_sorts_texts_is_built_with_its_classifier():
    entry = pasted(families.tiny("bert", "classification"), id2label={"0": "bad", "1": "so", "2": "good"})
    assert entry.config["architectures"] == ["BertForSequenceClassification"] and not entry.is_causal
    assert configs.build_meta(entry.config).classifier.out_features == 3
    assert "writes no text" in entry.note and "counted and not trained" in entry.note


def test_a_decoder_is_causal_whatever_its_class_is_called():
    assert (
        pasted(families.tiny("bert-generation")).is_causal
        and not pasted(families.tiny("bert", "classification")).is_causal
    )


@pytest.mark.parametrize(
    "quantized, said",
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "GPTQ of 4 bits"),
        ({"quant_method": "awq", "bits": "four"}, "AWQ:"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8:"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "MXFP4:"),
        ({"load_in_4bit": True}, "QUANTIZED:"),
    ],
)
def test_a_quantized_checkpoint_is_counted_as_it_is_without_and_said(quantized, said):
    entry, plain = pasted(LLAMA, quantization_config=quantized), pasted(LLAMA)
    assert architecture.of(entry.key) == architecture.of(plain.key)
    assert said in entry.note and "quantization chosen here" in entry.note and plain.note == ""
    assert models.find(entry.key) == entry


def test_of_a_vision_model_it_is_said_that_the_text_model_alone_is_counted(capsys):
    text = families.tiny("llama")
    entry = pasted({"model_type": "llava", "text_config": text, "quantization_config": {"quant_method": "awq"}})
    assert "of this llava, the text model alone is counted; its checkpoint is AWQ" in entry.note and entry.is_causal
    assert models.find(entry.key).note == entry.note and pasted(entry.config).note.endswith(entry.note.split(":", 1)[1])
    assert cli.main(["params", "--model", entry.key]) == cli.main(["memory", "--model", entry.key]) == 0
    assert capsys.readouterr().out.count("of this llava") == 2


def test_a_layer_that_differs_from_the_others_is_counted_as_it_is():
    shape = architecture.build({
        "model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0,
    })  # fmt: skip
    assert {m.d_out for m in shape.modules if m.short_name == "q_proj"} == {64, 128} and shape.facts.head_size == 16


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Points the Hub at a server of the test's own, with nothing remembered and nothing cached."""

    def at(port):
        url = f"http://127.0.0.1:{port}"
        hub = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}
        for name, value in (hub | {"HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path)}).items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        models._asked.cache_clear()

    yield at
    models._asked.cache_clear()


@pytest.fixture
def answers(hub):
    """A Hub that answers every request with `answers.status`, `answers.code` and `answers.body`, and counts them."""

    class Answer(BaseHTTPRequestHandler):
        status, code, body, asked = 200, "", b"{}", 0

        def do_HEAD(self):
            Answer.asked += 1
            self.send_response(self.status)
            about = {"X-Repo-Commit": "0" * 40, "ETag": f'"{zlib.crc32(self.body)}"', "Content-Length": len(self.body)}
            for name, value in (about | {"X-Error-Code": self.code}).items():
                self.send_header(name, str(value))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(self.body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub(server.server_port)
        yield Answer
        server.shutdown()


def test_a_config_from_the_hub(answers):
    answers.body = json.dumps(LLAMA).encode()
    assert architecture.of("some/one") == architecture.build(LLAMA)
    asked = answers.asked
    assert models.find("some/one").hub_id == "some/one" and answers.asked == asked  # a minute long
    models._asked.cache_clear()
    answers.status = 500  # what was fetched before still counts
    assert models.find("some/one").config == configs.normal(LLAMA)


@pytest.mark.parametrize(
    "status, code, body, said",
    [
        (401, "RepoNotFound", b"", "no such model"),
        (403, "GatedRepo", b"", "is gated; .*hf auth login"),
        (404, "EntryNotFound", b"", "no config.json"),
        (500, "", b"", "could not be asked"),
        (200, "", b"<html>", "makes no model here .*not JSON"),
        (200, "", b" " * 2_000_000, "2,000,000 bytes"),
    ],
)
def test_what_the_hub_refuses_is_said_and_remembered(answers, status, code, body, said):
    answers.status, answers.code, answers.body = status, code, body
    assert re.search(said, refused(models.find, "some/one"))
    asked = answers.asked
    assert refused(models.find, "some/one") and answers.asked == asked


def test_a_hub_that_never_ends_its_answer(hub, monkeypatch):
    assert models.HUB_SECONDS <= 5
    monkeypatch.setattr(models, "HUB_SECONDS", 0.5)
    monkeypatch.setattr(models, "HUB_MEMORY", 1e9)  # no minute ends meanwhile
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
                while not stop.wait(0.1):
                    connection.sendall(b"x")

        threading.Thread(target=drip, daemon=True).start()
        hub(server.getsockname()[1])
        for least, most in ((0.45, 1.5), (0, 0.1)):  # the second slider move does not wait
            start = time.monotonic()
            with pytest.raises(SpecError, match="did not answer in 5 s; paste its config.json"):
                models.find("some/one")
            assert least < time.monotonic() - start < most
        stop.set()


def test_offline_is_said(hub, monkeypatch):
    hub(9)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(models.find, "some/one")


def test_two_threads_may_be_the_first_to_need_transformers():
    """The page loads its model while it asks for the exact figures."""
    script = """if True:
        import threading
        from peftlab import seam
        start, said = threading.Barrier(4), []
        def need():
            start.wait()
            said.append("llama" in seam.library().CONFIG_MAPPING)
        threads = [threading.Thread(target=need) for _ in range(4)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert said == [True] * 4, said
    """
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_nothing_is_built_while_a_model_is_being_loaded():
    """transformers ties no weights then, in any thread, and a tied model would be counted untied."""
    made = []
    thread = threading.Thread(target=lambda: made.append(configs.build_meta(CONFIGS["llama-tied"])))
    with seam.building:
        thread.start()
        thread.join(0.2)
        assert made == []
    thread.join(30)
    assert sum(p.numel() for p in made[0].parameters()) == 162_240
