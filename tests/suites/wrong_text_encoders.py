"""Text encoders, each with one mistake."""

import random

import torch
from tests.suites.mistakes import Mistake, suite_of

from latentmill.plugin import CONTRACT, RowError, TensorSpec, TextEncoder
from latentmill.testing import TextEncoderSuite


class Right(TextEncoder):
    """Letters as numbers, 200 of them."""

    contract = CONTRACT
    length = 200

    def __init__(self, weight=1.0):
        self.weight = weight

    def fingerprint(self):
        return f"letters-{self.weight}"

    def check(self, prompt):
        if len(prompt) > self.length:
            raise RowError(f"{len(prompt)} letters, and {self.length} can be read")

    def encode(self, prompts):
        letters = [[ord(c) / 64 for c in prompt.ljust(self.length)[: self.length]] for prompt in prompts]
        return {"embeds": self.weight * torch.tensor(letters)[:, :, None]}


class ChecksWithWeights(Right):
    vocabulary = None

    def load(self, device):
        self.vocabulary = {"fox"}

    def check(self, prompt):
        super().check(prompt)
        len(self.vocabulary)


class WarnsWithWeights(Right):
    loaded = False

    def load(self, device):
        self.loaded = True

    def warn(self, prompt):
        return "read to its end" if self.loaded else ""


class SaysWhatItMakes(Right):
    def conditioning_spec(self):
        return {"embeds": TensorSpec((self.length, 1), "float32")}


class SaysHalfTheBytes(Right):
    def conditioning_spec(self):
        return {"embeds": TensorSpec((self.length, 1), "float16")}


class SaysListsOfSides(Right):
    def conditioning_spec(self):
        return {"embeds": (self.length, 1)}


class SpecWithWeights(Right):
    def load(self, device):
        self.width = 1

    def conditioning_spec(self):
        return {"embeds": TensorSpec((self.length, self.width), "float32")}


class PadsToTheLongest(Right):
    def encode(self, prompts):
        longest = max(map(len, prompts))
        return {"embeds": super().encode(prompts)["embeds"][:, : longest + 1]}


class GrowsWithThePrompt(Right):
    length = 100_000

    def encode(self, prompts):
        found = super().encode([prompt[:100] for prompt in prompts])["embeds"]
        return {"embeds": found[:, : 100 if all(len(prompt) <= 100 for prompt in prompts) else 200]}


class Normalises(Right):
    def encode(self, prompts):
        found = super().encode(prompts)["embeds"]
        return {"embeds": found / found.mean()}


class PadsBefore(Right):
    """The axis of letters first."""

    def encode(self, prompts):
        return {"embeds": super().encode(prompts)["embeds"].transpose(0, 1)}


class Sorts(Right):
    def encode(self, prompts):
        before = [*prompts]
        prompts.sort()
        return super().encode(before)


class NoNone(Right):
    def encode_negative(self, prompts):
        return self.encode([prompt.strip() for prompt in prompts])


class NegativeOfOtherShape(Right):
    def encode_negative(self, prompts):
        return {"embeds": super().encode_negative(prompts)["embeds"][:, :77]}


class FirstWord(Right):
    def encode(self, prompts):
        return super().encode([prompt[:0] for prompt in prompts])


class Drops(Right):
    """Dropout that is left on."""

    def encode(self, prompts):
        return {"embeds": torch.nn.functional.dropout(super().encode(prompts)["embeds"], 0.1)}


class Shuffles(Right):
    def encode(self, prompts):
        found = super().encode(prompts)["embeds"]
        return {"embeds": found + random.random()}


class LearnsWords(Right):
    """A number for each new word, as it comes."""

    def __init__(self):
        super().__init__()
        self.words = {}

    def encode(self, prompts):
        numbers = [[self.words.setdefault(w, len(self.words)) for w in ["", *p.split()]][-1] for p in prompts]
        return {"embeds": super().encode(prompts)["embeds"] + torch.tensor(numbers)[:, None, None]}


class ListsLetters(Right):
    def encode(self, prompts):
        letters = [*{c for c in "abcdefghijklmnopqrstuvwxyz"}]
        return {
            "embeds": super().encode(prompts)["embeds"]
            + sum(i * i * ord(c) for i, c in enumerate(letters)) % 1009 / 1000
        }


class Cuda(Right):
    def check(self, prompt):
        super().check(prompt)
        torch.cuda.device_count()


class PassesAll(Right):
    def check(self, prompt):
        pass


class ConstantPrint(Right):
    def fingerprint(self):
        return "letters"


def text_encoder(what, plugin, caught_by, says, **settings):
    settings.setdefault("refused", "x" * 300 if plugin.length == 200 else None)
    suite = suite_of(TextEncoderSuite, plugin, **settings)
    return Mistake(what, suite, set(caught_by.split()), says)


CHECK, TENSORS = "check_and_warn_need_no_weights", "the_conditioning_is_tensors_with_the_batch_axis_first"
VARY, COUNT = "shapes_do_not_vary_by_prompt", "prompts_count"
SPEC = "the_conditioning_is_what_conditioning_spec_says"
PROCESS, GPU, PRINT = (
    "another_process_finds_the_same", "building_and_asking_touch_no_gpu", "the_fingerprint_follows_the_weights",
)  # fmt: skip
ROWS, WRITES, MEMORY, RANDOM = (
    "rows_do_not_touch_each_other", "arguments_are_left_as_they_were", "nothing_is_remembered_between_calls",
    "no_global_random_generator_is_used",
)  # fmt: skip

MISTAKES = [
    text_encoder("`check` reads weights", ChecksWithWeights, f"{CHECK} {PROCESS}", "check needs weights"),
    text_encoder("`warn` reads weights", WarnsWithWeights, CHECK, "warn says something else once weights are loaded"),
    text_encoder("says another dtype", SaysHalfTheBytes, SPEC, "conditioning_spec says other names, shapes or dtypes than encode"),
    text_encoder("says shapes alone", SaysListsOfSides, SPEC, "gives no dict of TensorSpec"),
    text_encoder("`conditioning_spec` reads weights", SpecWithWeights, f"{SPEC} {PROCESS}", "conditioning_spec needs weights"),
    text_encoder("pads to the longest of the batch", PadsToTheLongest, f"{VARY} {ROWS}", "pad to one length"),
    text_encoder("long prompts are longer tensors", GrowsWithThePrompt, VARY, "pad to one length"),
    text_encoder("divides by the batch's mean", Normalises, ROWS, "encode gives row 0 otherwise in a batch than alone"),
    text_encoder("tokens before the batch axis", PadsBefore, f"{TENSORS} {ROWS}", "the batch axis comes first"),
    text_encoder("sorts the list of prompts", Sorts, WRITES, "encode writes into its argument 'prompts'"),
    text_encoder("no negative prompt is an error", NoNone, f"{TENSORS} {WRITES} {MEMORY} {RANDOM} {ROWS} {PROCESS}",
                 "encode_negative raises AttributeError for prompts"),
    text_encoder("negative prompts of another shape", NegativeOfOtherShape, TENSORS, "both go through the network in one batch"),
    text_encoder("reads no word", FirstWord, COUNT, "two different prompts give the same conditioning"),
    text_encoder("dropout is left on", Drops, RANDOM, "global random generator of torch"),
    text_encoder("noise of the module random", Shuffles, RANDOM, "global random generator of random"),
    text_encoder("numbers words as they come", LearnsWords, MEMORY, "gives other results after an earlier call"),
    text_encoder("numbers words in the order of a set", ListsLetters, PROCESS, "gives other results in another process"),
    text_encoder("asks for a GPU in `check`", Cuda, GPU, "Cuda.check calls torch.cuda.device_count before load(device)"),
    text_encoder("`check` passes what can't be encoded", PassesAll, CHECK, "check passes the prompt that the suite calls"),
    text_encoder("a fingerprint that is a name", ConstantPrint, PRINT, "the fingerprint stays when the weights change",
                 changed=lambda self: ConstantPrint(2.0)),
]  # fmt: skip

RIGHT = [suite_of(TextEncoderSuite, Right, refused="x" * 300, changed=lambda self: Right(2.0)),
         suite_of(TextEncoderSuite, SaysWhatItMakes, refused="x" * 300, changed=lambda self: SaysWhatItMakes(2.0))]  # fmt: skip
