"""The short forwards of training compute what the released classes compute, and the optimisers learn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tools.default_model import models
from tools.default_model.data import WORDS, ShardSource, make_shard
from tools.default_model.optimiser import Clock, Muon, orthogonal
from tools.default_model.steps import Stepper
from tools.default_model.tokens import PREFIX, SPECIALS, SUFFIX, TEMPLATE, Encoder
from tools.default_model.train import load_state, save_state
from tools.default_model.train_model import Pool, Recipe, Trainer, make_stepper, pack, time_shift, trained_parameters
from tools.default_model.train_vae import decode, encode, flatten, unflatten
from tools.default_model.world import FORMATS

FINE, COARSE = models.LAYOUTS["fine"], models.LAYOUTS["coarse"]
TOKENIZER = Path(__file__).resolve().parents[2] / "vllm_omni" / "data" / "default_model" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(str(TOKENIZER))


@pytest.fixture
def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(0)
    specials = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return models.make_text_encoder(len(tokenizer), specials, **sizes)


def test_the_template_has_the_released_lengths(tokenizer: Qwen2Tokenizer) -> None:
    before, after = TEMPLATE.split("{}")
    assert len(tokenizer(before).input_ids) == PREFIX
    assert len(tokenizer(after).input_ids) == SUFFIX
    text = TEMPLATE.format("two small red circles on a striped white background")
    ids, counts = Encoder(TOKENIZER)(["two small red circles on a striped white background"], WORDS)
    assert ids[0, : counts[0]].tolist() == tokenizer(text).input_ids


def test_text_features_are_those_of_the_pipeline(text_encoder: Qwen2_5_VLForConditionalGeneration) -> None:
    ids, counts = Encoder(TOKENIZER)(["a red circle", "three large blue stars on a black background"], WORDS)
    rows = torch.from_numpy(ids)
    mask = (torch.arange(rows.shape[1])[None] < torch.from_numpy(counts)[:, None]).long()
    with torch.no_grad():
        full = text_encoder(input_ids=rows, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        short = models.encode_text(text_encoder, rows)
    assert torch.equal((full * mask[..., None]) != 0, (short * mask[..., None]) != 0)
    torch.testing.assert_close(full * mask[..., None], short * mask[..., None], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "rows", "columns"), [(COARSE, 8, 8), (COARSE, 6, 10), (FINE, 16, 16), (FINE, 12, 20)]
)
def test_velocity_is_the_forward_of_diffusers(layout: models.Layout, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    room = layout.patches(FORMATS[0])
    transformer = models.make_transformer(layout, num_layers=2, num_attention_heads=2, joint_attention_dim=64)
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    latents, text = torch.randn(2, rows * columns, layout.width), torch.randn(2, 10, 64)
    real = torch.arange(10)[None] < torch.tensor([[10], [6]])
    times = torch.tensor([0.25, 0.75])
    arguments = {"encoder_hidden_states": text, "encoder_hidden_states_mask": real, "timestep": times}
    with torch.no_grad():
        full = transformer(hidden_states=latents, img_shapes=[[(1, rows, columns)]] * 2, **arguments).sample
        transformer.set_attn_processor(models.JointAttention())
        tables = models.rotary_tables(transformer, rows, columns, 10, room)
        padded = nn.functional.pad(latents, (0, 0, 0, room - rows * columns), value=3.0)
        picture = (torch.arange(room) < rows * columns).expand(2, -1)
        mask = torch.cat([real, picture], dim=1)[:, None, None]
        short = models.velocity(transformer, padded, text, mask, times, tables)
    torch.testing.assert_close(short[:, : rows * columns], full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", [COARSE, FINE])
def test_the_flat_autoencoder_is_the_released_one(layout: models.Layout) -> None:
    torch.manual_seed(0)
    vae, flat = models.make_vae(layout), models.make_vae(layout)
    flat.load_state_dict(vae.state_dict())
    flatten(flat)
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        whole = vae.encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)
        torch.testing.assert_close(encode(flat, images)[0], whole, atol=1e-4, rtol=1e-4)
        again = unflatten(flat, models.make_vae(layout))
        pictures = again.decode(whole.unsqueeze(2)).sample.squeeze(2)
        torch.testing.assert_close(decode(flat, whole).clamp(-1, 1), pictures, atol=1e-4, rtol=1e-4)


def test_orthogonal_updates() -> None:
    torch.manual_seed(0)
    out = orthogonal(torch.randn(3, 24, 16))
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_learns_a_product() -> None:
    torch.manual_seed(0)
    left, right = nn.Parameter(torch.randn(24, 16) * 0.1), nn.Parameter(torch.randn(16, 24) * 0.1)
    target = torch.randn(24, 16) @ torch.randn(16, 24)
    muon = Muon([left, right], 0.1)
    first = last = 0.0
    for step in range(150):
        left.grad = right.grad = None
        loss = (left @ right - target).square().mean()
        loss.backward()
        muon.step(torch.tensor(1 - step / 150))
        first, last = first or loss.item(), loss.item()
    assert last < 0.1 * first


@pytest.fixture
def stepper(text_encoder: Qwen2_5_VLForConditionalGeneration) -> Stepper:
    torch.manual_seed(0)
    transformer = models.make_transformer(COARSE, num_layers=1, num_attention_heads=2, joint_attention_dim=64)
    ids, counts = Encoder(TOKENIZER)(["a red circle", "a blue square"], WORDS)
    pool = Pool(2, COARSE.patches(FORMATS[0]), COARSE.width, "cpu")
    pool.append(pack(torch.randn(2, 16, 16, 16)), torch.from_numpy(ids), torch.from_numpy(counts))
    trainer = Trainer(COARSE, text_encoder, transformer, [pool] * len(FORMATS), [ids[0, :40].tolist()], "cpu")
    return make_stepper(trainer, trained_parameters(text_encoder, transformer), Recipe(1.0, batch=8))


def test_warming_up_changes_nothing(stepper: Stepper) -> None:
    before = [parameter.detach().clone() for parameter in stepper.optimiser.parameters]
    stepper.warm()
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.optimiser.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.optimiser.average.values, strict=True))
    assert stepper.total.item() == 0


def test_steps_lower_the_loss(stepper: Stepper) -> None:
    losses = []
    for _ in range(30):
        stepper.total.zero_()
        stepper.step(0, 1.0)
        losses.append(stepper.total.item())
    assert sum(losses[-5:]) < 0.93 * sum(losses[:5])


def test_a_pool_gives_what_was_put_in() -> None:
    pool = Pool(5, 4, 3, "cpu")
    assert pool.rows(10).tolist() == [0] * 10
    pool.append(torch.ones(2, 4, 3), torch.ones(2, PREFIX + WORDS), torch.tensor([40, 41]))
    pool.append(torch.full((1, 2, 3), 2.0), torch.ones(1, PREFIX + WORDS), torch.tensor([42]))
    assert set(pool.rows(100).tolist()) == {0, 1, 2}
    assert pool.counts[:3].tolist() == [40, 41, 42]
    assert pool.latents[2].tolist() == [[2.0] * 3] * 2 + [[0.0] * 3] * 2


def test_states_are_saved_and_loaded(tmp_path: Path, text_encoder: Qwen2_5_VLForConditionalGeneration) -> None:
    save_state(tmp_path, {"text_encoder": text_encoder})
    before = {name: tensor.clone() for name, tensor in text_encoder.state_dict().items()}
    with torch.no_grad():
        for name, parameter in text_encoder.named_parameters():
            if "visual." not in name:
                parameter.zero_()
    load_state([tmp_path], {"text_encoder": text_encoder})
    assert all(torch.equal(before[name], tensor) for name, tensor in text_encoder.state_dict().items())
    with pytest.raises(FileNotFoundError):
        load_state([tmp_path / "nothing"], {"text_encoder": text_encoder})


def test_several_states_are_averaged(tmp_path: Path) -> None:
    part = nn.Linear(2, 1)
    for name, value in (("one", 1.0), ("two", 4.0)):
        nn.init.constant_(part.weight, value)
        save_state(tmp_path / name, {"part": part})
    load_state([tmp_path / "one", tmp_path / "two"], {"part": part})
    assert part.weight.tolist() == [[2.5, 2.5]]


def test_shards_depend_on_their_seed_alone() -> None:
    with ShardSource(4, TOKENIZER, 1) as source:
        source.order(FORMATS[1], 20, 10)
        first, second = source.shards(FORMATS[1])
    assert (first.ids == make_shard(5, 10, FORMATS[1], TOKENIZER).ids).all()
    assert (first.primitives != second.primitives).any()


def test_the_clock_ends_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(50.0, warmup=2)
    assert clock.scale() == pytest.approx(0.5)
    now[0] = 150.0
    assert clock.share == 1.0
    assert clock.scale() == pytest.approx(0.01)
    clock.restart(deadline=160.0)
    now[0] = 155.0
    assert clock.share == pytest.approx(0.5)


def test_times_shift_as_the_scheduler_does() -> None:
    assert time_shift(COARSE, 256) == pytest.approx(1.6487, abs=1e-3)
    assert 1.6 < time_shift(COARSE, 64) < time_shift(COARSE, 256)
    assert time_shift(FINE, 256) == pytest.approx(math.exp(FINE.shift))
