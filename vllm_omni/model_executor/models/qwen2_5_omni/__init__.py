"""Qwen2.5-Omni: thinker (text), talker (codec tokens) and token2wav (24 kHz waveform)."""
