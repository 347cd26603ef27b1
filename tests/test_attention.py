import peft
import pytest
import torch
import transformers
from torch.nn.attention import flex_attention

from kv_compression.io.errors import UsageError
from kv_compression.methods.full_attention import FullAttention
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.local_attention import LocalAttention
from kv_compression.methods.rule import Rule
from kv_compression.methods.scattered_attention import ScatteredAttention
from kv_compression.methods.sink_attention import SinkAttention
from kv_compression.model.attention import Patch
from kv_compression.model.cache import SentinelCache
from tests import slow_rules
from tests.layouts import CL, CR
from tests.models import random_model

IDS = torch.tensor(
    [
        [5, 6, 7, CR, 9, CL, 8, 9, 10, CR, CL, 7, 3, CR, 4, 5, 6, 7, CL, 3],
        [9, 8, CL, 7, 6, 5, 4, CR, 3, 4, 5, 6, CL, 8, 9, CR, 10, 11, 12, 13],
    ]
)
BASELINES = [LocalAttention(ratio=0.6), SinkAttention(ratio=0.6), ScatteredAttention(ratio=0.6), FullAttention()]


def expected_logits(model, ids: list[int]) -> torch.Tensor:
    """One row through the unpatched model, with the restated mask and positions given by hand."""
    seen = torch.tensor(slow_rules.kv_mask(ids, CL, CR))
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    positions = torch.tensor([slow_rules.positions(ids, CL, CR)])
    return model(torch.tensor([ids]), attention_mask=additive, position_ids=positions).logits


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "opt", "gptj"])
def test_the_patch_derives_mask_and_positions_from_the_tokens(architecture):
    model = random_model(architecture)
    plain = model(IDS).logits
    with torch.no_grad(), Patch(model, KVCompression(CL, CR)):
        patched = model(IDS).logits
        by_name = model(input_ids=IDS, use_cache=False).logits
    expected = torch.cat([expected_logits(model, row) for row in IDS.tolist()])
    torch.testing.assert_close(patched, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_name, patched)
    assert not torch.allclose(patched, plain, atol=1e-2)
    assert torch.equal(model(IDS).logits, plain)  # as it was


@pytest.fixture
def flex_attention_on_a_cpu(monkeypatch):
    """FlexAttention as plain torch operations: its CPU kernel has no backward pass, its definition has."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    with torch.compiler.set_stance("force_eager"):
        yield


OPTIONS = KVCompression(CL, CR, sink_tokens=2, recent_tokens=3, cr_tokens=2, cr_visibility="context")


@pytest.mark.parametrize("rule", [KVCompression(CL, CR), OPTIONS, *BASELINES], ids=lambda rule: rule.name)
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "opt"])
def test_implementations_agree_forward_and_backward(architecture, rule, flex_attention_on_a_cpu):
    logits, gradients = {}, {}
    for implementation in ("eager", "sdpa", "grouped", "flex_attention", "sorted_flex_attention"):
        model = random_model(architecture, implementation)
        with Patch(model, rule):
            logits[implementation] = model(IDS, use_cache=False).logits
            logits[implementation].square().mean().backward()
        gradients[implementation] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for implementation in ("sdpa", "grouped", "flex_attention", "sorted_flex_attention"):
        torch.testing.assert_close(logits[implementation], logits["eager"], rtol=1e-4, atol=1e-5)
        for name, gradient in gradients["eager"].items():
            torch.testing.assert_close(gradients[implementation][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_flex_attention_agrees_on_a_gpu():
    ids = IDS.repeat(1, 4).cuda()
    results = []
    for implementation in ("sdpa", "flex_attention", "sorted_flex_attention"):
        model = random_model("wide_llama", implementation).cuda()
        with Patch(model, KVCompression(CL, CR)):
            logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        results.append((logits, model.get_input_embeddings().weight.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "grouped"])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "opt"])
def test_padding_on_the_right_changes_nothing(architecture, implementation):
    model = random_model(architecture, implementation)
    padded = torch.cat([IDS, torch.full((2, 5), 0)], dim=1)
    padded[1, 15:] = 0
    real = torch.ones_like(padded)
    real[0, 20:], real[1, 15:] = 0, 0
    with torch.no_grad(), Patch(model, KVCompression(CL, CR)):
        logits = model(padded, attention_mask=real).logits
        torch.testing.assert_close(logits[:1, :20], model(IDS[:1]).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[1:, :15], model(IDS[1:, :15]).logits, rtol=1e-4, atol=1e-5)
    assert logits.isfinite().all()


def test_baselines_use_their_own_masks():
    model = random_model("gpt_neox")
    for rule in BASELINES:
        allowed = torch.ones(20, 20).tril().bool()
        if type(rule) is LocalAttention:
            allowed = torch.tensor(slow_rules.local_mask(20, 0.6))
        elif isinstance(rule, SinkAttention):
            allowed = torch.tensor(slow_rules.sink_mask(20, 0.6, 4))
        elif isinstance(rule, ScatteredAttention):
            allowed = rule.visible(IDS[:1])(torch.tensor(0), 0, torch.arange(20)[:, None], torch.arange(20)[None])
        additive = torch.zeros(20, 20).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad(), Patch(model, rule):
            patched = model(IDS[:1]).logits
        torch.testing.assert_close(patched, model(IDS[:1], attention_mask=additive).logits, rtol=1e-4, atol=1e-5)


def test_a_compressed_span_reaches_later_text_only_through_its_cr():
    model = random_model("llama").double()
    ids = torch.tensor([[5, CL, 7, 8, 9, CR, 4, 6]])
    with Patch(model, KVCompression(CL, CR)), torch.no_grad():
        base = model(ids).logits[0, -1]
        without_cr = model(torch.tensor([[5, CL, 7, 8, 9, 4, 6]])).logits[0, -1]
        changed = ids.clone()
        changed[0, 3] = 20
        assert not torch.allclose(model(changed).logits[0, -1], base)  # <CR> carries it
    assert not torch.allclose(base, without_cr)

    embedding = model.get_input_embeddings()
    states = embedding(ids).detach().requires_grad_()
    handle = embedding.register_forward_hook(lambda *_: states)
    model.model.layers = model.model.layers[:1]  # what one layer reads directly
    with Patch(model, KVCompression(CL, CR)):
        gradient = torch.autograd.grad(model(ids, use_cache=False).logits[0, -1].sum(), states)[0][0]
    handle.remove()
    reached = gradient.abs().sum(-1) > 0
    assert reached.tolist() == [True, False, False, False, False, True, True, True]


def test_patching_before_or_after_peft_is_the_same():
    ids = IDS[:1]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"])
    model = random_model("gpt_neox")
    with torch.no_grad(), Patch(model, KVCompression(CL, CR)):
        expected = model(ids).logits
    adapted = peft.get_peft_model(model, config)
    handle = Patch(adapted, KVCompression(CL, CR))
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="patched already"):
        Patch(adapted, KVCompression(CL, CR))
    handle.remove()
    handle.remove()
    Patch(adapted, Rule()).remove()


def test_what_a_patched_model_cannot_know_is_refused():
    model = random_model("gpt_neox", "sdpa")
    with Patch(model, KVCompression(CL, CR)):
        with pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 4, 32))
        with pytest.raises(ValueError, match="padding"):
            model(IDS, attention_mask=torch.ones(2, 1, 20, 20))
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="SentinelCache"):
            model(IDS, past_key_values=cache)


def test_grouped_attention_without_a_patch_is_plain_causal_attention():
    expected = random_model("llama", "sdpa")(IDS).logits
    torch.testing.assert_close(random_model("llama", "grouped")(IDS).logits, expected, rtol=1e-4, atol=1e-5)


WINDOWS = {
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "llama4_text": {
        "attention_chunk_size": 6,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "head_dim": 8,
        "attn_temperature_tuning": False,
    },
}


def windowed_model(kind: str, implementation: str = "sdpa", dtype=torch.float64):
    """A tiny model whose layers, or every other one, have a sliding window or chunks of their own."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
    config = transformers.AutoConfig.for_model(kind, **shape, **WINDOWS[kind], bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "grouped"])
@pytest.mark.parametrize("kind", WINDOWS)
@torch.no_grad()
def test_layers_keep_their_own_windows_and_chunks(kind, implementation):
    ids = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    model = windowed_model(kind, implementation)
    exact = implementation != "eager" and kind in ("mistral", "qwen2")  # others compute parts in fp32
    tolerance = 1e-9 if exact else 1e-5
    plain = model(ids, use_cache=False).logits
    with Patch(model, FullAttention()):
        assert (model(ids, use_cache=False).logits - plain).abs().max() < tolerance
    for rule in (KVCompression(CL, CR), KVCompression(CL, CR, sink_tokens=1, recent_tokens=3), *BASELINES):
        with Patch(model, rule):
            one_pass = model(IDS, use_cache=False).logits
            cache = SentinelCache(rule=rule)
            cached = [model(part, past_key_values=cache).logits for part in IDS.split([7, 1, 1, 6, 5], dim=1)]
        assert (torch.cat(cached, dim=1) - one_pass).abs().max() < tolerance


@torch.no_grad()
def test_a_layer_window_counts_text_and_is_within_the_rule():
    """What the last query of a one-layer Mistral reads: the rule's keys less than its window of 5 positions away."""
    model = windowed_model("mistral")
    model.model.layers = model.model.layers[:1]
    ids = torch.tensor([[5, 6, CL, 7, 8, CR, 9, CL, 10, 11, CR, 12, 13]])
    positions = slow_rules.positions(ids[0].tolist(), CL, CR)
    with Patch(model, KVCompression(CL, CR)):
        base = model(ids, use_cache=False).logits[0, -1]
        for k in range(12):
            changed = ids.clone()
            changed[0, k] = 40 if ids[0, k] not in (CL, CR) else ids[0, k]
            reads = slow_rules.visible(ids[0].tolist(), 12, k, CL, CR)
            reads &= slow_rules.own_pattern(positions[12], positions[k], "sliding", 5)
            differs = not torch.equal(model(changed, use_cache=False).logits[0, -1], base)
            assert differs == (reads and bool((changed != ids).any()))


REFUSED = {
    "bloom": ({"n_layer": 2, "n_head": 4, "hidden_size": 32}, "ALiBi"),
    "falcon": ({"alibi": True, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}, "ALiBi"),
    "gpt_neo": ({"num_layers": 2, "attention_types": [[["global", "local"], 1]], "hidden_size": 32}, "local layers"),
    "mamba": ({"num_hidden_layers": 2, "hidden_size": 32}, "mamba cannot be patched"),
    "roberta": ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "is_decoder": True}, "padding"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_architectures_that_cannot_be_right_are_refused_by_name(kind):
    options, reason = REFUSED[kind]
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{kind} cannot be patched.*") as caught:
        Patch(model, KVCompression(CL, CR))
    assert reason in str(caught.value)


def test_an_architecture_that_nobody_has_checked_is_refused():
    model = random_model("llama")
    model.config.model_type = "llama_of_mine"
    with pytest.raises(ValueError, match="llama_of_mine cannot be patched: nobody has checked it"):
        Patch(model, KVCompression(CL, CR))


def test_an_implementation_that_takes_no_mask_is_refused():
    model = random_model("llama", "sdpa")
    with Patch(model, KVCompression(CL, CR)):
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="flash_attention_2 takes no mask"):
            model(IDS)


@torch.no_grad()
def test_a_text_longer_than_the_model_has_positions_is_refused():
    model = random_model("opt", "sdpa")  # 96 positions
    ids = torch.full((1, 96), 5)
    with Patch(model, KVCompression(CL, CR)):
        model(ids)
        model(torch.tensor([[5] * 90 + [CL, *[6] * 6, CR]]))  # sentinels take no position
        with pytest.raises(UsageError, match="97 tokens, more than the model's 96 positions"):
            model(torch.full((1, 97), 5))
        cache = SentinelCache(CL, CR)
        model(ids, past_key_values=cache)
        with pytest.raises(UsageError, match="97 tokens, more than the model's 96 positions"):
            model(torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
def test_padding_takes_no_position_of_a_text_that_follows_a_cache():
    model, cache = random_model("opt", "sdpa"), SentinelCache(CL, CR)  # 96 positions
    ids, real = torch.full((2, 80), 5), torch.ones(2, 80, dtype=torch.long)
    real[1, 40:] = 0
    with Patch(model, KVCompression(CL, CR)):
        model(ids, attention_mask=real, past_key_values=cache)
        new = torch.ones(2, 50, dtype=torch.long)
        new[0, :-16] = 0
        model(torch.full((2, 50), 6), attention_mask=new, past_key_values=cache)
        assert cache.text_read.tolist() == [96, 90]
        with pytest.raises(UsageError, match="97 tokens"):
            model(torch.full((2, 1), 6), past_key_values=cache)


def test_a_window_of_any_size_is_a_window():
    ids = torch.tensor([[5, 6, CL, 7, 8, CR, 9]])
    far = KVCompression(CL, CR, recent_tokens=2**31).mask(ids)
    assert torch.equal(far, KVCompression(CL, CR, recent_tokens=50).mask(ids))
    assert torch.equal(far, KVCompression(CL, CR, recent_tokens=2**62).mask(ids))


@pytest.mark.parametrize("compile_it", [lambda model: torch.compile(model, backend="eager"), None])
@torch.no_grad()
def test_a_patch_is_in_effect_in_a_model_that_was_compiled_before(compile_it):
    model = random_model("llama", "sdpa")
    with Patch(model, KVCompression(CL, CR)):
        expected = model(IDS, use_cache=False).logits
    if compile_it is None:
        model.compile(backend="eager")
    compiled = compile_it(model) if compile_it else model
    plain = compiled(IDS, use_cache=False).logits
    for _ in range(2):
        with Patch(model, KVCompression(CL, CR)):
            torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, plain)


@pytest.mark.parametrize("implementation", ["sdpa", "grouped"])
def test_values_may_be_narrower_than_keys(implementation):
    expected = random_model("deepseek_v2", "eager")
    found = random_model("deepseek_v2", implementation)
    with torch.no_grad(), Patch(expected, KVCompression(CL, CR)), Patch(found, KVCompression(CL, CR)):
        torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)
