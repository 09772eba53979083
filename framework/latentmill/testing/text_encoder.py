"""What every text encoder must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor

from latentmill.plugin import RowError, TensorSpec, TextEncoder
from latentmill.testing.behaviour import Arguments, MethodCall, close, loaded
from latentmill.testing.suite import RowsSuite, identity, without_weights


class TextEncoderSuite(RowsSuite):
    """What every text encoder must hold. Runs on the CPU."""

    kind = "text_encoder"
    text_encoder: ClassVar[type[TextEncoder]]
    """The class; for other settings than its defaults, a subclass or ``functools.partial`` of it."""
    prompts: ClassVar[Sequence[str]] = (
        "a fox",
        "two houses by the sea, at night, and a boat that is longer than both",
        "",
    )
    """Different prompts that it can encode: a short one, a long one, and the empty one."""
    refused: ClassVar[str | None] = None
    """A prompt that ``check`` refuses, if there is one."""

    def test_check_and_warn_need_no_weights(self) -> None:
        """They are asked where nothing is loaded, and answer as they do where it is."""
        bare, ready = self.text_encoder(), loaded(self.text_encoder)
        for prompt in self.prompts:
            found = without_weights(bare, "check", prompt)
            assert not isinstance(found, ValueError), (
                f"check refuses a prompt of the suite: set `prompts` to others\n{found}"
            )
            warning = without_weights(bare, "warn", prompt)
            assert isinstance(warning, str), (
                f"warn gives {type(warning).__name__}: it says a sentence, or an empty string"
            )
            assert warning == ready.warn(prompt), (
                "warn says something else once weights are loaded: it must not need them"
            )
        if self.refused is not None:
            for encoder in (bare, ready):
                found = without_weights(encoder, "check", self.refused)
                assert isinstance(found, RowError), (
                    "check passes the prompt that the suite calls `refused`: raise RowError for what can't be encoded"
                )

    def test_the_conditioning_is_tensors_with_the_batch_axis_first(self) -> None:
        """Of ``encode`` and of ``encode_negative``, which take the empty prompt, and the latter None."""
        encoder = loaded(self.text_encoder)
        shapes: dict[str, dict[str, list[int]]] = {}
        with torch.no_grad():
            for method, prompts in (("encode", [*self.prompts]), ("encode_negative", [*self.prompts[1:], None])):
                try:
                    found = getattr(encoder, method)(prompts, **defaults(encoder))
                except Exception as error:
                    raise AssertionError(
                        f"{method} raises {type(error).__name__} for prompts that check passes, the empty one and, for negative "
                        f"ones, None among them\n{error}"
                    ) from error
                assert isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values()), (
                    f"{method} gives {type(found).__name__}: it gives a dict of tensors"
                )
                for name, value in found.items():
                    assert value.shape[:1] == (len(prompts),), (
                        f"{method} gives {name!r} of shape {list(value.shape)} for {len(prompts)} prompts: the batch axis comes first"
                    )
                    finite = not value.is_floating_point() or bool(value.isfinite().all())
                    assert finite, f"{method} gives {name!r} with numbers that are not finite"
                shapes[method] = {name: list(value.shape[1:]) for name, value in found.items()}
        assert shapes["encode"] == shapes["encode_negative"], (
            "encode_negative gives other names or shapes than encode: both go through the network in one batch\n"
            f"{shapes['encode_negative']} {shapes['encode']}"
        )

    def test_shapes_do_not_vary_by_prompt(self) -> None:
        """Rows are put together whatever their prompts are."""
        encoder = loaded(self.text_encoder)
        prompts = [*self.prompts, " ".join([max(self.prompts, key=len)] * 40)]
        known: dict[str, list[int]] = {}
        with torch.no_grad():
            for prompt in prompts:
                if prompt not in self.prompts and isinstance(without_weights(encoder, "check", prompt), RowError):
                    continue  # too long, and said so
                for name, value in encoder.encode([prompt], **defaults(encoder)).items():
                    shape = known.setdefault(name, list(value.shape[1:]))
                    assert list(value.shape[1:]) == shape, (
                        f"encode gives {name!r} of shape {list(value.shape[1:])} for one prompt and {shape} for another: "
                        "pad to one length, so that rows can be put together"
                    )

    def test_the_conditioning_is_what_conditioning_spec_says(self) -> None:
        """Names, shapes and dtypes, for all prompts, told without weights; needs an encoder that says them."""
        said = without_weights(self.text_encoder(), "conditioning_spec")
        if said is None:
            raise SkipTest(
                "not checked: it says no conditioning_spec, so plan can't say how large encoded prompts will be"
            )
        assert isinstance(said, Mapping) and all(isinstance(spec, TensorSpec) for spec in said.values()), (
            f"conditioning_spec gives no dict of TensorSpec, by names of conditioning\n{said!r}"
        )
        encoder = loaded(self.text_encoder)
        with torch.no_grad():
            for prompt in self.prompts:
                encoded = encoder.encode([prompt], **defaults(encoder))
                found = {name: TensorSpec.of(value[0]) for name, value in encoded.items()}
                assert found == dict(said), (
                    "conditioning_spec says other names, shapes or dtypes than encode gives: plan goes by it\n"
                    f"{dict(said)} said, {found} given"
                )

    def test_prompts_count(self) -> None:
        """Different prompts give different conditioning."""
        encoder = loaded(self.text_encoder)
        with torch.no_grad():
            found = [encoder.encode([prompt], **defaults(encoder)) for prompt in self.prompts]
        shapes = {tuple(tuple(value.shape) for value in one.values()) for one in found}
        for a in range(len(found)):
            for b in range(a):
                assert len(shapes) > 1 or not close(found[a], found[b]), (
                    "two different prompts give the same conditioning: the prompt is not read to its end, or not at all"
                )

    def _question(self) -> Callable[[Any], dict[str, Any]]:
        return partial(asked, prompts=tuple(self.prompts))

    def _calls(self) -> list[MethodCall]:
        return [
            MethodCall("encode", encode, {"prompts": [*self.prompts]}),
            MethodCall("encode_negative", encode_negative, {"prompts": [*self.prompts[1:], None]}),
        ]


def asked(encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Any]:
    """What is asked of a text encoder before it is loaded."""
    passed = [str(without_weights(encoder, "check", prompt)) for prompt in prompts]
    return {
        **identity(encoder),
        "check": passed,
        "warn": [without_weights(encoder, "warn", prompt) for prompt in prompts],
        "conditioning_spec": repr(without_weights(encoder, "conditioning_spec")),
    }


def encode(encoder: TextEncoder, rows: Arguments) -> dict[str, Tensor]:
    """``encode`` as a call."""
    return dict(encoder.encode(rows["prompts"], **defaults(encoder)))


def encode_negative(encoder: TextEncoder, rows: Arguments) -> dict[str, Tensor]:
    """``encode_negative`` as a call."""
    return dict(encoder.encode_negative(rows["prompts"], **defaults(encoder)))


def defaults(encoder: TextEncoder) -> dict[str, Any]:
    """The fields of rows that it reads, at their defaults."""
    return {field.name: field.default for field in encoder.row_fields}
