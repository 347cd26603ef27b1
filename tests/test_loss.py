import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, kl_div

from kv_compression.model import loss
from kv_compression.model.lora import add_lora, lora_targets
from kv_compression.model.loss import TokenLosses
from tests.models import CONFIGS, random_model

IDS = torch.randint(3, 60, (2, 17), generator=torch.Generator().manual_seed(0))


def labels_of(ids):
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    labels[0, 3:6] = -100
    return labels


def adapted(architecture="llama", tied=True):
    """A model with LoRA and two trainable rows whose adapters already do something."""
    config = type(CONFIGS[architecture]).from_dict(CONFIGS[architecture].to_dict() | {"tie_word_embeddings": tied})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = add_lora(model, lora_targets(model, None), 4, (62, 63)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("at_once", [1, 64 * 5, 1 << 26])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "opt", "gptj"])
def test_losses_and_gradients_are_those_of_the_logits(architecture, tied, at_once, monkeypatch):
    monkeypatch.setattr(loss, "SCORES_AT_ONCE_ON_CPU", at_once)
    model = adapted(architecture, tied)
    ids = IDS.clone()
    ids[0, 4], ids[1, 9] = 62, 63
    labels = labels_of(IDS)
    token_losses = TokenLosses(model)
    assert token_losses._chunked
    found = token_losses(labels, input_ids=ids)
    slow = cross_entropy(model(input_ids=ids).logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(found, slow)
    weights = torch.rand(found.shape)
    for name, gradient in gradients(model, (slow * weights).sum()).items():
        torch.testing.assert_close(
            gradients(model, (token_losses(labels, input_ids=ids) * weights).sum())[name], gradient
        )
        if at_once > 1 and "lora" in name:
            break  # all of them once


def test_other_devices_count_labels_without_asking(monkeypatch):
    """What CUDA takes: no selection of labels, the same losses."""
    model, labels = adapted(), labels_of(IDS)
    token_losses = TokenLosses(model)
    hidden = token_losses.hidden_states(input_ids=IDS).flatten(0, 1)
    everything = token_losses._losses(hidden, labels.flatten(), None, 0.0)
    torch.testing.assert_close(everything.view(labels.shape), token_losses(labels, input_ids=IDS))
    mine = torch.autograd.grad(everything.sum(), hidden, retain_graph=True)[0]
    assert mine[labels.flatten() == -100].abs().max() == 0


def test_distillation_mixes_the_label_with_the_teachers_prediction():
    model, labels = adapted(), labels_of(IDS)
    token_losses = TokenLosses(model)
    with torch.no_grad(), model.disable_adapter():
        teacher = token_losses.hidden_states(input_ids=IDS)
        log_q = model(input_ids=IDS).logits.log_softmax(-1)
    found = token_losses(labels, teacher=teacher, distill_weight=0.3, input_ids=IDS)
    log_p = model(input_ids=IDS).logits.log_softmax(-1)
    divergence = kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) * (labels >= 0)
    slow = 0.7 * cross_entropy(log_p.transpose(1, 2), labels, reduction="none") + 0.3 * divergence
    torch.testing.assert_close(found, slow)
    mine, theirs = gradients(model, found.mean()), gradients(model, slow.mean())
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient)


def test_a_model_that_does_more_to_its_logits_makes_them_itself():
    config = transformers.Gemma2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        vocab_size=64,
        final_logit_softcapping=0.5,
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    token_losses = TokenLosses(model)
    assert not token_losses._chunked
    labels = labels_of(IDS)
    slow = cross_entropy(model(IDS).logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(token_losses(labels, input_ids=IDS), slow)
    with pytest.raises(ValueError, match="distillation"):
        token_losses(labels, teacher=torch.zeros(2, 17, 32), input_ids=IDS)


def test_a_head_that_is_trained_gets_its_gradient():
    model = random_model("llama").train()
    labels = labels_of(IDS)
    TokenLosses(model)(labels, input_ids=IDS).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_merged_and_disabled_adapters_use_the_plain_head():
    model, labels = adapted(), labels_of(IDS)
    with model.disable_adapter(), torch.no_grad():
        slow = cross_entropy(model(input_ids=IDS).logits.transpose(1, 2), labels, reduction="none")
        torch.testing.assert_close(TokenLosses(model)(labels, input_ids=IDS), slow)
    assert isinstance(model, peft.PeftModel)
