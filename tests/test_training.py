import math
import re

import accelerate
import pytest
import torch
import transformers
from accelerate.state import GradientState

from kv_compression.data.blocks import Blocks
from kv_compression.io.errors import RunError, UsageError
from kv_compression.methods.kv_compression import KVCompression
from kv_compression.methods.scattered_attention import ScatteredAttention
from kv_compression.model import lora
from kv_compression.model.attention import Patch
from kv_compression.settings import LR_SCHEDULERS, Settings
from kv_compression.spans.plan import SpanPlan
from kv_compression.training import loop as training_loop
from kv_compression.training.checkpoints import Checkpoint, Checkpoints
from kv_compression.training.schedule import EPOCHS_APART, Schedule, StepData
from tests.models import CONFIGS, random_model

CL, CR = 62, 63


def settings(**changes) -> Settings:
    recipe = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    return Settings(**recipe | {"num_train_epochs": 2, "mixed_precision": "no", "bound_ratio": 0.5} | changes)


def blocks_of(count: int = 10, ratio: float = 0.4) -> Blocks:
    tokens = torch.arange(20).repeat(count, 1) + 3
    return Blocks(tokens, "train", SpanPlan(True, ratio, 6, 0), CL, CR)


def adapted(architecture="gpt_neox", tied=False, dtype=torch.float32):
    config = type(CONFIGS[architecture]).from_dict(CONFIGS[architecture].to_dict() | {"tie_word_embeddings": tied})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return lora.add_lora(model, lora.lora_targets(model, None), 4, (CL, CR))


def run(model, blocks, rule, wanted, **options):
    accelerator = accelerate.Accelerator()
    with Patch(model, rule) as patch:
        prepared = training_loop.prepare(model, accelerator, wanted)
        report = training_loop.train(prepared, blocks, patch, accelerator, wanted, None, **options)
        assert patch.rule == rule
        return report


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "opt"])
def test_only_lora_and_the_two_sentinel_rows_move(architecture, tied):
    model = adapted(architecture, tied)
    causal_lm = model.get_base_model()

    def matrices():
        """Input and output embeddings as the model uses them, and every weight of the base model."""
        ids = torch.arange(64)[None]
        with torch.no_grad():
            rows = causal_lm.get_input_embeddings()(ids)[0].clone()
            head = causal_lm.get_output_embeddings()(torch.eye(32)).T.clone()
        return rows, head

    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    rows_before, head_before = matrices()
    report = run(model, blocks_of(), KVCompression(CL, CR), settings())
    rows_after, head_after = matrices()
    moved = (rows_before != rows_after).any(-1).nonzero().flatten().tolist()
    assert moved == [CL, CR]
    assert (head_before != head_after).any(-1).nonzero().flatten().tolist() == ([CL, CR] if tied else [])
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert report.steps == 6
    assert report.tokens == 2 * 10 * 19


def test_training_lowers_the_loss_and_is_the_same_for_the_same_seed():
    losses = []
    for _ in range(2):
        transformers.set_seed(0)
        report = run(adapted(), blocks_of(), KVCompression(CL, CR), settings(num_train_epochs=8))
        losses.append(report.loss)
    assert losses[0] == losses[1] < 4  # it starts at 4.2, log(64)
    assert report.tokens_per_second > 0


def test_everything_trainable_is_fp32_over_a_bf16_model():
    model = adapted(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_schedule_reads_every_block_once_an_epoch():
    wanted = settings(per_device_train_batch_size=3, gradient_accumulation_steps=2)
    schedule = Schedule(wanted, 10, 1)
    assert (schedule.steps_per_epoch, schedule.num_steps) == (2, 4)
    for epoch in (0, 1):
        read = [schedule.blocks_of(step) for step in (2 * epoch, 2 * epoch + 1)]
        assert [len(schedule.micro_batches(blocks)) for blocks in read] == [2, 2]
        assert sorted(block for blocks in read for block in blocks) == list(range(10))
    assert schedule.blocks_of(0) != schedule.blocks_of(2)
    assert Schedule(settings(max_train_steps=3), 10, 1).num_steps == 3


class Noted:
    """A writer that keeps the learning rates."""

    def __init__(self):
        self.rates = []

    def add(self, name, value, step):
        if name == "train/learning_rate":
            self.rates.append(value)


def rates_of(blocks, wanted, **options) -> tuple[list[float], training_loop.TrainingReport]:
    noted, model, accelerator = Noted(), adapted(), accelerate.Accelerator()
    with Patch(model, KVCompression(CL, CR)) as patch:
        prepared = training_loop.prepare(model, accelerator, wanted)
        report = training_loop.train(prepared, blocks, patch, accelerator, wanted, noted, **options)
    return noted.rates, report


def published_rates(num_blocks: int, wanted: Settings) -> list[float]:
    """The learning rate of every update of a loop that hands its scheduler to accelerate as the published one does."""
    GradientState._reset_state()
    accumulation = wanted.gradient_accumulation_steps
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulation)
    model = torch.nn.Linear(1, 1)
    loader = torch.utils.data.DataLoader(torch.zeros(num_blocks, 1), batch_size=wanted.per_device_train_batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=wanted.learning_rate)
    updates = wanted.max_train_steps or wanted.num_train_epochs * math.ceil(len(loader) / accumulation)
    scheduler = transformers.get_scheduler(
        wanted.lr_scheduler_type,
        optimizer,
        num_warmup_steps=wanted.num_warmup_steps * accumulation,
        num_training_steps=updates * accumulation,
    )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    rates = []
    while len(rates) < updates:
        for batch in loader:
            with accelerator.accumulate(model):
                rate = optimizer.param_groups[0]["lr"]
                accelerator.backward(model(batch).sum())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.append(rate)
            if len(rates) == updates:
                break
    GradientState._reset_state()
    return rates


@pytest.mark.parametrize("changes", [{}, {"num_warmup_steps": 1}, {"max_train_steps": 5}])
@pytest.mark.parametrize("kind", LR_SCHEDULERS)
def test_published_learning_rates_are_those_of_the_published_loop(kind, changes):
    wanted = settings(gradient_accumulation_steps=3, lr_scheduler_type=kind, published_schedule=True, **changes)
    expected = published_rates(10, wanted)
    rates, report = rates_of(blocks_of(), wanted)
    assert rates == pytest.approx(expected, rel=1e-12)
    assert report.last_learning_rate == rates[-1]
    assert (report.scheduler_steps, report.steps) == (3 * len(expected), len(expected))
    assert report.scheduler_warmup_steps == 3 * wanted.num_warmup_steps


def test_the_published_decay_ends_at_two_thirds_of_the_rate_and_the_sane_one_at_nothing():
    recipe = {"gradient_accumulation_steps": 3, "learning_rate": 2e-5, "max_train_steps": 18}
    rates, report = rates_of(blocks_of(), settings(published_schedule=True, **recipe))
    assert report.last_learning_rate == pytest.approx(2e-5 * (1 - 17 / 54))
    assert rates[-1] - (rates[0] - rates[1]) == pytest.approx(2e-5 * 2 / 3)  # where the next step would be
    rates, report = rates_of(blocks_of(), settings(**recipe))
    assert report.last_learning_rate == pytest.approx(2e-5 * (1 - 17 / 18))
    assert (report.scheduler_steps, report.scheduler_warmup_steps) == (18, 0)


def test_a_resumed_run_keeps_the_published_rates(tmp_path):
    wanted = settings(gradient_accumulation_steps=3, published_schedule=True, num_warmup_steps=1)
    checkpoints = Checkpoints(tmp_path, {}, steps=2)
    whole, report = rates_of(blocks_of(), wanted, checkpoints=checkpoints)
    rest, resumed = rates_of(blocks_of(), wanted, resume=checkpoints.read(2))
    assert rest == whole[2:]
    assert resumed.last_learning_rate == report.last_learning_rate == whole[-1]


def test_weight_decay_shrinks_what_is_trained():
    def size(**changes):
        model = adapted()
        run(model, blocks_of(), KVCompression(CL, CR), settings(**changes))
        return sum(value.detach().abs().sum() for value in model.parameters() if value.requires_grad)

    assert size(weight_decay=10.0) < 0.9 * size()


@pytest.mark.parametrize("num_blocks", [16, 10, 3])
def test_processes_read_together_what_one_reads_alone(num_blocks):
    def data(size, processes):
        schedule = Schedule(settings(per_device_train_batch_size=size), num_blocks, processes)
        return [StepData(blocks_of(num_blocks), schedule, number, False) for number in range(processes)]

    (one,), two = data(4, 1), data(2, 2)
    for step in range(len(one)):
        for alone, *parts in zip(one[step], two[0][step], two[1][step], strict=True):
            read = [part for part in parts if (part.inputs["labels"] != -100).any()]
            assert sum((part.blocks for part in read), []) == alone.blocks
            targets = sum(int((part.inputs["labels"] != -100).sum()) for part in parts)
            assert targets == alone.num_targets == parts[0].num_targets == parts[1].num_targets
            lengths = [len(blocks_of(num_blocks)[block]) for block in alone.blocks] if step == 0 else []
            assert lengths == sorted(lengths)


def test_spans_are_redrawn_every_epoch_unless_fixed():
    def block_zero(fixed, epoch):
        wanted = settings(fixed_spans=fixed, per_device_train_batch_size=1, gradient_accumulation_steps=1)
        schedule = Schedule(wanted, 1, 1)
        step = StepData(blocks_of(1), schedule, 0, fixed)[epoch]
        return step[0].inputs["input_ids"].tolist()

    assert block_zero(True, 0) == block_zero(True, 1)
    assert block_zero(False, 0) != block_zero(False, 1)
    assert block_zero(False, 0) == block_zero(True, 0)


def test_scattered_keys_are_redrawn_every_epoch_and_the_rule_is_put_back():
    seeds = []

    class Recorded(ScatteredAttention):
        def sees(self, tokens):
            if len(tokens.kinds) > 1:  # not the token that the model is tried on
                seeds.append(self.seed)
            return super().sees(tokens)

    run(adapted(), blocks_of(4, 0.0), Recorded(ratio=0.5, seed=7), settings())
    assert seeds == [7, 7, 7 + EPOCHS_APART, 7 + EPOCHS_APART]


def test_a_loss_that_is_not_finite_stops_the_run():
    model = adapted()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(RunError, match=r"loss is nan at step 1, blocks \[\d"):
        run(model, blocks_of(), KVCompression(CL, CR), settings())


@pytest.mark.parametrize("option", ["gradient_checkpointing", "compile"])
def test_what_makes_it_faster_or_smaller_changes_nothing_else(option, monkeypatch):
    traced = torch.nn.Module.compile  # all but the code generator, which takes a minute
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda *args, **kwargs: traced(*args, **kwargs, backend="aot_eager")
    )

    def loss(**changes):
        return run(adapted(), blocks_of(), KVCompression(CL, CR), settings(**changes)).loss

    assert loss(**{option: True}) == pytest.approx(loss(), rel=1e-5)


def test_sentinels_may_have_a_learning_rate_of_their_own():
    def moved(rate):
        model = adapted()
        rows = {name: p.detach().clone() for name, p in model.named_parameters() if "trainable_tokens" in name}
        run(model, blocks_of(4), KVCompression(CL, CR), settings(sentinel_learning_rate=rate, num_train_epochs=1))
        after = dict(model.named_parameters())
        return max((after[name] - row).abs().max().item() for name, row in rows.items())

    assert moved(1.0) > 20 * moved(None) > 0


def test_a_teacher_sees_all_text_and_no_adapter():
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.tensor([[5, CL, 6, 7, CR, 8, 9]])
    text = torch.tensor([[5, 6, 7, 8, 9]])
    rule = KVCompression(CL, CR)
    with Patch(model, rule) as patch:
        taught = training_loop.Teacher(model.train(), patch, 0.5)({"input_ids": ids})
        assert patch.rule is rule
        assert model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        expected = model.get_base_model().gpt_neox(text).last_hidden_state
    torch.testing.assert_close(taught["teacher"][:, [0, 2, 3, 5, 6]], expected)
    assert taught["distill_weight"] == 0.5


def test_distillation_draws_towards_the_teacher():
    """With the teacher's prediction as the only target the loss is its divergence, and falls."""

    def loss(**changes):
        model = adapted()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        wanted = settings(distill_weight=1.0, **changes)
        return run(model, blocks_of(8), KVCompression(CL, CR), wanted).loss

    assert 0 < loss(num_train_epochs=8) < 0.8 * loss(max_train_steps=1)


def test_lora_targets():
    assert lora.lora_targets(random_model("gpt_neox"), None) == ["query_key_value", "dense"]
    assert lora.lora_targets(random_model("llama"), ("up_proj",)) == ["up_proj"]
    with pytest.raises(UsageError, match="no such linear module .this model has: .*k_proj"):
        lora.lora_targets(random_model("llama"), ("attention",))
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(UsageError, match="unknown architecture bloom.*--lora_target_modules.*query_key_value"):
        lora.lora_targets(bloom, None)


def test_a_checkpoint_of_another_model_or_run_is_refused_and_changes_nothing(tmp_path):
    blocks, wanted = blocks_of(), settings()

    def train(model, **options):
        return run(model, blocks, KVCompression(CL, CR), wanted, **options)

    checkpoints = Checkpoints(tmp_path, {}, steps=3)
    train(adapted(), checkpoints=checkpoints)
    found = checkpoints.read(3)
    model = adapted()
    before = {name: value.clone() for name, value in model.named_parameters()}
    names = [name for name in found.tensors if "lora_A" in name]
    without = {name: value for name, value in found.tensors.items() if name != "optimizer.0.exp_avg"}
    wrong = [
        (found.tensors | {names[0]: torch.zeros(1)}, found.state, 3, names[0]),
        (found.tensors | {"x": torch.zeros(1)}, found.state, 3, "x"),
        (without, found.state, 3, "optimizer.0.exp_avg"),
        (found.tensors | {"optimizer.0.step": torch.tensor(-1.0)}, found.state, 3, "optimizer.0.step"),
        (found.tensors | {"random": torch.zeros_like(found.tensors["random"])}, found.state, 3, "random"),
        (found.tensors, found.state | {"tokens": "1"}, 3, "state"),
        (found.tensors, {}, 3, "state"),
        (found.tensors, found.state, 2, "losses"),
        (found.tensors, found.state, 7, "6 steps"),
    ]
    for tensors, state, step, words in wrong:
        with pytest.raises(RunError, match=f"checkpoint of step {step} .*{re.escape(words)}"):
            train(model, resume=Checkpoint(step, tensors, state))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert train(model, resume=found).steps == 6
