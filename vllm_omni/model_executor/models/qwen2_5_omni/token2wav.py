"""Token2wav stage of Qwen2.5-Omni: codec tokens and a voice -> 24 kHz waveform. Always float32.

A request is a window of an utterance: its codes, how many codes lie before the window, and which of them to return the
sound of. The whole utterance is the window that starts at 0 and keeps everything. Windows are independent requests, so
a stream keeps no state here and chunks of many streams share a batch.

**What depends on what.** The initial noise is drawn by the frame's place in the utterance, so overlapping windows see
the same noise. One evaluation of the flow sees ``look_backward`` + own + ``look_ahead`` blocks of 12 codes, and the
vocoder about 18 codes to both sides; 36 evaluations in a row let the sight grow by a block each, with quickly falling
weight. A window gives the samples of the whole utterance when it covers it, and samples close to them when it has some
codes of context on both sides (``stage_input_processors.codec_chunks``).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.logger import init_logger
from vllm_omni.model_executor.models.interfaces import OmniRequestState
from vllm_omni.model_executor.models.qwen2_5_omni.bigvgan import AntiAliasedSnake, BigVGAN, GraphedVocoder
from vllm_omni.model_executor.models.qwen2_5_omni.dit import CodecDiT
from vllm_omni.model_executor.models.qwen2_5_omni.flow import FlowInput, FlowSettings, MelSampler
from vllm_omni.model_executor.models.qwen2_5_omni.voices import Voice, load_voices
from vllm_omni.model_executor.models.utils import OnePassModel

logger = init_logger(__name__)

SAMPLE_RATE = 24000
_PREFIX = "token2wav."
_FLOW_FRAMES = 32768
"""Mel frames in one batch of the flow, to bound its memory; one request may have more."""
_VOCODER_FRAMES = 8192
GRAPHED_BLOCKS = (2, 4, 7, 10, 12, 14, 20, 28, 42, 56, 84, 112)
"""Blocks of 12 codes for which the flow is captured: windows of one stream (2, 4, 7, 12, then always 14; the last has
up to 15) to eight steady ones."""
GRAPHED_CODES = (24, 48, 64, 84, 112, 138, 164)
"""Codes for which the vocoder is captured: what windows of one stream decode (24, 44, 76, 112, then always 136), and
sizes of which a last window finds one, since it has 28 codes more than the vocoder sees."""
TRIED_CODES = (24,)
"""Those of the first window, where the vocoder's convolutions try their algorithms."""
_KEPT_SEEDS = 8


@dataclass
class _Window:
    """One checked request."""

    codes: list[int]
    voice: Voice
    offset: int
    keep: tuple[int, int]
    seed: int
    flow: FlowSettings


class Qwen2_5OmniToken2WavModel(OnePassModel):
    """The generation stage. Payload of a request:

    - ``codes``: list of T codes of the window.
    - ``speaker``: name of the voice, default ``Chelsie``.
    - ``offset``: codes of the utterance before the window, default 0.
    - ``keep``: (begin, end) codes within the window whose sound is returned, default all.
    - ``seed``: of the initial noise, default 0: the same codes always give the same sound.
    - ``num_steps``, ``guidance_scale``, ``sway_coefficient``: see ``FlowSettings``.

    Output: ``audio`` [samples] float32 in [-1, 1] and ``sr``.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        self.config = model.hf_config
        with set_default_torch_dtype(torch.float32):
            self.code2wav_dit_model = CodecDiT(self.config.dit_config)
            self.code2wav_bigvgan_model = BigVGAN(self.config.bigvgan_config)
        self.repeats = int(self.config.dit_config.repeats)
        self.samples_per_code = self.repeats * self.code2wav_bigvgan_model.hop
        self.voices = load_voices(model.model, model.revision, vllm_config.load_config.download_dir)
        self._check_voices()
        self._reach = -(-self.code2wav_bigvgan_model.reach // self.repeats)
        self._noise: dict[int, torch.Tensor] = {}
        self._prepare()
        self._voice_rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def _prepare(self) -> None:
        """What depends on the weights."""
        self.code2wav_dit_model.join_weights()
        self._sampler = MelSampler(self.code2wav_dit_model)
        self._vocoder = GraphedVocoder(self.code2wav_bigvgan_model)

    def _check_voices(self) -> None:
        dit = self.config.dit_config
        for voice in self.voices.values():
            if voice.speaker.shape != (dit.enc_emb_dim,) or voice.ref_mel.shape[1] != dit.mel_dim:
                raise ConfigError(
                    f"voice {voice.name!r}: cond {tuple(voice.speaker.shape)} and ref_mel {tuple(voice.ref_mel.shape)}"
                    f" do not fit the model ({dit.enc_emb_dim}, [frames, {dit.mel_dim}])",
                    field="model",
                )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the ``token2wav.`` tensors of the checkpoint.

        Raises:
            ValueError: a tensor has no parameter or another shape.
        """
        params = dict(self.named_parameters())
        loaded: set[str] = set()
        for full, tensor in weights:
            if not full.startswith(_PREFIX):
                continue
            name = full.removeprefix(_PREFIX)
            if name not in params or params[name].shape != tensor.shape:
                raise ValueError(f"checkpoint tensor {full!r} {tuple(tensor.shape)} has no such parameter here")
            params[name].data.copy_(tensor)
            loaded.add(name)
        self._prepare()
        self._voice_rows = {}
        return loaded

    def omni_generate(self, states: Sequence[OmniRequestState]) -> list[dict[str, Any]]:
        """Sound of every window. Requests share batches; none changes another's result beyond rounding."""
        with _products_as_convolutions():
            return self._generate([self._window(state) for state in states])

    def _generate(self, windows: Sequence[_Window]) -> list[dict[str, Any]]:
        mels: list[torch.Tensor] = [torch.empty(0)] * len(windows)
        for settings in dict.fromkeys(window.flow for window in windows):
            chosen = [i for i, w in enumerate(windows) if w.flow == settings and len(w.codes)]
            for part in _split(chosen, [len(windows[i].codes) * self.repeats for i in chosen], _FLOW_FRAMES):
                batch = [self._flow_input(windows[i]) for i in part]
                for i, mel in zip(part, self._sampler.sample(batch, settings), strict=True):
                    mels[i] = mel
        spans = [self._span(window) for window in windows]
        waves = self._vocode(
            [mel[begin * self.repeats : end * self.repeats] for mel, (begin, end) in zip(mels, spans, strict=True)]
        )
        outputs = []
        for window, (start, _), wave in zip(windows, spans, waves, strict=True):
            begin, end = (self.samples_per_code * (code - start) for code in window.keep)
            outputs.append({"audio": wave[begin:end], "sr": SAMPLE_RATE})
        return outputs

    def _span(self, window: _Window) -> tuple[int, int]:
        """The codes of a window that the vocoder decodes: those to keep and what it sees around them, and as many more
        as a captured length takes where the window has them."""
        count = len(window.codes)
        begin, end = max(0, window.keep[0] - self._reach), min(count, window.keep[1] + self._reach)
        lengths = (frames // self.repeats for frames in self._vocoder.lengths)
        length = next((n for n in lengths if end - begin <= n <= count), end - begin)
        begin = max(0, end - length)
        return begin, begin + length

    def omni_warm_up(self, max_num_seqs: int) -> None:
        """Compute what each voice and the default time points add, capture the flow, and run one short window."""
        device = self.code2wav_dit_model.proj_out.weight.device
        if device.type == "cuda":
            self._use_kernels(device)
            began = time.monotonic()
            with _products_as_convolutions():
                self._sampler.capture(GRAPHED_BLOCKS)
                codes, tried = ([n * self.repeats for n in sizes] for sizes in (GRAPHED_CODES, TRIED_CODES))
                self._vocoder.capture(codes, tried)
            logger.info("token2wav captured its graphs in %.1f s", time.monotonic() - began)
        for voice in self.voices.values():
            self._rows_of(voice, device)
        self.omni_generate([OmniRequestState("warm-up", 1, info={"codes": [0] * 24})])

    def _use_kernels(self, device: torch.device) -> None:
        """Run the vocoder's activations, and what stands between the flow's products, as kernels that work here."""
        from vllm_omni.model_executor.layers import snake_kernel

        wrong = self.code2wav_dit_model.use_kernels()
        if wrong is not None:
            logger.warning("token2wav runs its flow in PyTorch: %s", wrong)

        activation = self.code2wav_bigvgan_model.activation_post
        act = activation.act
        x = torch.linspace(-3, 3, 1000, device=device).view(1, 1, -1).repeat(1, len(act.alpha), 1)
        wrong = snake_kernel.check(
            lambda: snake_kernel.anti_aliased_snake(x, activation.filter, act.alpha, act.beta), activation.plain(x)
        )
        if wrong is not None:
            logger.warning("token2wav runs its activations in PyTorch: %s", wrong)
            return
        for module in self.code2wav_bigvgan_model.modules():
            if isinstance(module, AntiAliasedSnake):
                module.fused = True

    def _window(self, state: OmniRequestState) -> _Window:
        codes = state.info.get("codes")
        limit = self.code2wav_dit_model.num_codes
        if not isinstance(codes, list) or not all(isinstance(c, int) and 0 <= c < limit for c in codes):
            raise RequestError("codes must be a list of codec tokens", field="codes", allowed=f"0 to {limit - 1}")
        offset, keep = state.info.get("offset", 0), tuple(state.info.get("keep", (0, len(codes))))
        if offset < 0 or not 0 <= keep[0] <= keep[1] <= len(codes):
            raise RequestError(f"offset={offset}, keep={keep} for {len(codes)} codes", field="keep")
        longest = self.config.dit_config.max_position_embeddings // self.repeats
        if len(codes) > longest:
            raise RequestError(f"{len(codes)} codes are too many", field="codes", allowed=f"up to {longest}")
        flow = FlowSettings(**{f.name: state.info[f.name] for f in fields(FlowSettings) if f.name in state.info})
        flow.validate()
        voice = self.voices.pick(state.info.get("speaker"))
        return _Window(codes, voice, offset, keep, int(state.info.get("seed", 0)), flow)

    def _flow_input(self, window: _Window) -> FlowInput:
        dit = self.code2wav_dit_model
        device = dit.proj_out.weight.device
        voiced, plain = self._rows_of(window.voice, device)
        codes = torch.tensor(window.codes, device=device)
        start, count = window.offset * self.repeats, len(codes) * self.repeats
        noise = self._noise_of(window.seed, start + count, device)[start : start + count]
        return FlowInput(voiced + dit.code_rows(codes), plain + dit.code_rows(torch.zeros_like(codes)), noise)

    def _noise_of(self, seed: int, frames: int, device: torch.device) -> torch.Tensor:
        """Initial noise of an utterance's first ``frames`` frames at least; kept for the most recent seeds.

        Drawn on the CPU and from the first frame on, so that neither device nor window changes it.
        """
        noise = self._noise.pop(seed, None)
        if noise is None or len(noise) < frames:
            count = frames if noise is None else max(frames, 2 * len(noise))
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(count, self.code2wav_dit_model.config.mel_dim, generator=generator).to(device)
        while len(self._noise) >= _KEPT_SEEDS:
            del self._noise[next(iter(self._noise))]
        self._noise[seed] = noise  # the last one is the most recent
        return noise

    def _rows_of(self, voice: Voice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """What a voice adds to every frame; computed once."""
        if voice.name not in self._voice_rows:
            rows = self.code2wav_dit_model.voice_vectors(voice.ref_mel.to(device), voice.speaker.to(device))
            self._voice_rows[voice.name] = rows
        return self._voice_rows[voice.name]

    def _vocode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Waveform of each mel spectrogram [F, mel_dim]; those of equal length run together."""
        waves: list[torch.Tensor] = [torch.empty(0)] * len(mels)
        for length in sorted({len(mel) for mel in mels} - {0}):
            same = [i for i, mel in enumerate(mels) if len(mel) == length]
            for part in _split(same, [length] * len(same), _VOCODER_FRAMES):
                batch = torch.stack([mels[i].T for i in part])
                for i, wave in zip(part, self._vocoder(batch), strict=True):
                    waves[i] = wave
        return waves


@contextlib.contextmanager
def _products_as_convolutions() -> Iterator[None]:
    """Matrix products in TF32 where convolutions are (PyTorch's default on a GPU): both make the same sound."""
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _split(items: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """``items`` in runs whose sizes sum to ``limit`` at most, but one item at least."""
    runs: list[list[int]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not runs or total + size > limit:
            runs.append([])
            total = 0
        runs[-1].append(item)
        total += size
    return runs
