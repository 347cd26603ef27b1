"""A few architectures, tiny and random: each is right, or refused by name. All of them: benchmarks/architectures.py."""

from contextlib import nullcontext

import pytest

from benchmarks import architectures
from benchmarks.tiny_models import all_names

RIGHT = ["llama", "gpt2", "mistral", "gemma3_text", "granitemoehybrid (attention)"]
REFUSED = ["bloom", "falcon (alibi)", "mamba", "qwen3_next", "bert (bidirectional)"]
EITHER = ["roberta", "gpt_neo", "gpt_oss", "deepseek_v3", "llama4_text"]


@pytest.mark.parametrize("name", RIGHT)
def test_it_is_right(name):
    verdict = architectures.Checks(name).run()
    assert verdict.status == "right", verdict


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name):
    verdict = architectures.Checks(name).run()
    assert verdict.status == "refused", verdict
    assert len(set(verdict.refused.values())) == 1 and not verdict.differences


@pytest.mark.parametrize("name", EITHER)
def test_it_is_right_or_says_why_not(name):
    verdict = architectures.Checks(name).run()
    assert verdict.status in ("right", "refused", "partly refused"), verdict


def test_a_patch_that_does_nothing_is_found_out(monkeypatch):
    monkeypatch.setattr(architectures, "Patch", lambda *args, **kwargs: nullcontext())
    verdict = architectures.Checks("llama").run()
    assert verdict.status == "wrong"
    assert {"keys: kv", "keys: local"} <= set(verdict.wrong)


def test_a_window_that_is_lost_is_found_out(monkeypatch):
    """As if a layer's window were forgotten: the untouched model is built without one, the patched one is compared."""
    own = architectures.Checks("mistral (no window)")
    with_window = architectures.Checks("mistral")
    own.plain, own.own = (
        with_window.plain,
        architectures.keys_read(
            architectures.layer_calls(with_window.model, architectures.TEXT), range(architectures.LENGTH)
        ),
    )
    verdict = own.run()
    assert {"full: one pass", "keys: kv"} <= set(verdict.wrong)


def test_every_type_has_a_name_of_its_own():
    names = all_names()
    assert len(names) == len(set(names)) > 150
