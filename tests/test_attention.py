import peft
import pytest
import torch
from torch.nn.attention import flex_attention

from kv_compression.attention import compressed_attention, patch
from kv_compression.visibility import KVCompression, LocalAttention, Rule, ScatteredAttention, SinkAttention
from tests import slow_rules
from tests.layouts import CL, CR
from tests.models import random_model

IDS = torch.tensor(
    [
        [5, 6, 7, CR, 9, CL, 8, 9, 10, CR, CL, 7, 3, CR, 4, 5, 6, 7, CL, 3],
        [9, 8, CL, 7, 6, 5, 4, CR, 3, 4, 5, 6, CL, 8, 9, CR, 10, 11, 12, 13],
    ]
)
BASELINES = [LocalAttention(ratio=0.6), SinkAttention(ratio=0.6), ScatteredAttention(ratio=0.6), Rule()]


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
    with torch.no_grad(), compressed_attention(model, CL, CR):
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
        with compressed_attention(model, rule=rule):
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
        with compressed_attention(model, CL, CR):
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
    with torch.no_grad(), compressed_attention(model, CL, CR):
        logits = model(padded, attention_mask=real).logits
        torch.testing.assert_close(logits[:1, :20], model(IDS[:1]).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[1:, :15], model(IDS[1:, :15]).logits, rtol=1e-4, atol=1e-5)
    assert logits.isfinite().all()


def test_baselines_use_their_own_masks():
    model = random_model("gpt_neox")
    for rule in BASELINES:
        allowed = torch.ones(20, 20).tril().bool()
        if isinstance(rule, LocalAttention):
            allowed = torch.tensor(slow_rules.local_mask(20, 0.6))
        elif isinstance(rule, SinkAttention):
            allowed = torch.tensor(slow_rules.sink_mask(20, 0.6, 4))
        elif isinstance(rule, ScatteredAttention):
            allowed = rule.mask_mod(IDS[:1])(torch.tensor(0), 0, torch.arange(20)[:, None], torch.arange(20)[None])
        additive = torch.zeros(20, 20).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad(), compressed_attention(model, rule=rule):
            patched = model(IDS[:1]).logits
        torch.testing.assert_close(patched, model(IDS[:1], attention_mask=additive).logits, rtol=1e-4, atol=1e-5)


def test_a_compressed_span_reaches_later_text_only_through_its_cr():
    model = random_model("llama").double()
    ids = torch.tensor([[5, CL, 7, 8, 9, CR, 4, 6]])
    with compressed_attention(model, CL, CR), torch.no_grad():
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
    with compressed_attention(model, CL, CR):
        gradient = torch.autograd.grad(model(ids, use_cache=False).logits[0, -1].sum(), states)[0][0]
    handle.remove()
    reached = gradient.abs().sum(-1) > 0
    assert reached.tolist() == [True, False, False, False, False, True, True, True]


def test_patching_before_or_after_peft_is_the_same():
    ids = IDS[:1]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"])
    model = random_model("gpt_neox")
    with torch.no_grad(), compressed_attention(model, CL, CR):
        expected = model(ids).logits
    adapted = peft.get_peft_model(model, config)
    handle = patch(adapted, CL, CR)
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="patched already"):
        patch(adapted, CL, CR)
    handle.remove()
    handle.remove()
    patch(adapted, rule=Rule()).remove()


def test_what_a_patched_model_cannot_know_is_refused():
    model = random_model("gpt_neox", "sdpa")
    with pytest.raises(ValueError, match="either"):
        patch(model)
    with compressed_attention(model, CL, CR):
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


@pytest.mark.parametrize("implementation", ["sdpa", "grouped"])
def test_values_may_be_narrower_than_keys(implementation):
    expected = random_model("deepseek_v2", "eager")
    found = random_model("deepseek_v2", implementation)
    with torch.no_grad(), compressed_attention(expected, CL, CR), compressed_attention(found, CL, CR):
        torch.testing.assert_close(found(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)
