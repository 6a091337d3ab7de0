"""Media of a prompt, checked before vLLM's processors: what those answer without saying what is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, get_type_hints

import numpy as np
import torch

from vllm_omni.config.schema import nearest
from vllm_omni.errors import RequestError
from vllm_omni.model_executor.models.utils import CheckedSounds

_FORMS = {
    "image": "a PIL image, or an array of [height, width, 3]",
    "audio": "an array of samples, or (array, sampling rate)",
    "video": "an array of [frames, height, width, 3], or a list of PIL images",
}
_ARRAYS = (np.ndarray, torch.Tensor)


def check_media(media: Mapping[str, Any], named: Collection[str] = ()) -> None:
    """Check ``multi_modal_data``: one medium a kind, or a list of them; a medium alone or with what is known of it.

    Args:
        named: kinds whose media are known by their uuids; None stands for such a one.

    Raises:
        RequestError: a medium that is not decoded, that is empty, or whose numbers are none.
    """
    for kind, given in media.items():
        for item in given if isinstance(given, list) else [given]:
            if item is None and kind not in named:
                raise _wrong(f"{kind}: None is no medium; allowed is {_FORMS.get(kind, 'a medium')}")
            if item is not None:
                values, about = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
                _check_values(kind, values)
                if kind == "audio" and about is not None:
                    _check_rate(about)


def _check_values(kind: str, values: Any) -> None:
    undecoded = isinstance(values, (bytes, bytearray, memoryview, str, int, float))
    if kind in _FORMS and (undecoded or (kind == "audio" and isinstance(values, list))):
        raise _wrong(f"{kind}: a {type(values).__name__}; allowed is {_FORMS[kind]}")
    if not isinstance(values, _ARRAYS):
        return
    if 0 in values.shape:
        raise _wrong(f"{kind}: nothing is in it (its shape is {tuple(values.shape)})")
    if isinstance(values, np.ndarray) and values.dtype.kind not in "fiub":
        raise _wrong(f"{kind}: an array of {values.dtype}; allowed are numbers")
    finite = torch.isfinite(values) if isinstance(values, torch.Tensor) else np.isfinite(values)
    if not finite.all():
        raise _wrong(f"{kind}: holds values that are not finite (NaN or infinity)")


def _check_rate(rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise _wrong(f"audio: sampling rate {rate!r}: must be a number above 0")


def check_places(prompt: Mapping[str, Any], names: Mapping[int, str], tokenizer: Any) -> None:
    """Compare the media of a prompt with the places for them.

    Args:
        prompt: ``prompt`` or ``prompt_token_ids``, and ``multi_modal_data``.
        names: placeholder tokens, and the kinds of media that they stand for.
        tokenizer: writes the tokens as text.

    Raises:
        RequestError: there are more media of a kind than places.
    """
    for token, kind in names.items():
        given = prompt.get("multi_modal_data", {}).get(kind)
        count = len(given) if isinstance(given, list) else int(given is not None)
        text = tokenizer.convert_ids_to_tokens(token)
        tokens = prompt.get("prompt_token_ids")
        places = prompt["prompt"].count(text) if tokens is None else list(tokens).count(token)
        if count > places:
            raise _wrong(f"{kind}: {count} given, but the prompt has {places} places for them ({text})")


def check_processor_kwargs(given: Mapping[str, Any], processor: Any) -> None:
    """Check ``mm_processor_kwargs`` of the models of this package: names, or the four groups of transformers'
    processors (``images_kwargs``) with names in them.

    Args:
        given: the arguments.
        processor: vLLM's of the model; None for a model that takes text alone.

    Raises:
        RequestError: the processor does not have such an argument.
    """
    field = "mm_processor_kwargs"
    if processor is None:
        raise RequestError(f"{field}: the model takes text alone", field=field)
    if not isinstance(processor.info, CheckedSounds):
        return  # what vLLM's code of any other model reads itself is written down nowhere
    groups = {name: set(known) for name, known in processor.info.supported_mm_processor_kwargs.items()}
    for name, group in get_type_hints(processor.info.get_hf_processor().valid_processor_kwargs).items():
        groups.setdefault(name, set()).update(group.__annotations__)
    every = set().union(*groups.values())
    for name, value in given.items():
        inner, known = (value, groups[name]) if name in groups else ([name], every)
        if name in groups and not isinstance(value, Mapping):
            raise RequestError(f"{field}: {name} must be a dictionary, got {type(value).__name__}", field=field)
        for key in inner:
            if key not in known:
                raise RequestError(
                    f"{field}: the processor has no {key!r}{nearest(str(key), known)}",
                    field=field,
                    allowed=sorted(known),
                )


def _wrong(text: str) -> RequestError:
    return RequestError(text, field="multi_modal_data")
