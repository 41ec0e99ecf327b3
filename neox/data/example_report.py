"""What became of the examples of `finetune_data`, counted and told."""

from __future__ import annotations

from dataclasses import dataclass

from neox import log
from neox.config import NeoXConfig
from neox.data.examples import Example


@dataclass
class Report:
    """Counts; lengths are in tokens, the end-of-document token included."""

    files: int
    examples: int = 0  # that are kept
    tokens: int = 0  # of these
    learnt: int = 0  # of these tokens
    shortest: int = 0
    longest: int = 0  # that is kept
    empty: int = 0  # blank lines, and examples without text
    too_long: int = 0  # for a sample
    longest_given: int = 0  # before it was cut
    cut_prompts: int = 0
    cut_ends: int = 0
    cut_tokens: int = 0
    left_out: int = 0  # for their length, as allow_chopped: false asks
    beyond: int = 0  # left out because all that is learnt was cut
    unlearnt: int = 0  # left out because nothing is learnt

    def take(
        self, example: Example | None, room: int | None, allow_chopped: bool
    ) -> Example | None:
        """The example as it is kept, at most `room` tokens long; None where it is not."""
        if example is None:
            self.empty += 1
            return None
        length = len(example.tokens)
        self.longest_given = max(self.longest_given, length)
        if not example.learnt:
            self.unlearnt += 1
            return None
        if room is not None and length > room:
            self.too_long += 1
            if not allow_chopped:
                self.left_out += 1
                return None
            whole, example = example, example.cut(room)
            if not example.learnt:
                self.beyond += 1
                return None
            self.cut_prompts += example.prompt < whole.prompt
            self.cut_ends += length - len(example.tokens) > whole.prompt - example.prompt
            self.cut_tokens += length - len(example.tokens)
        self._keep(example)
        return example

    def _keep(self, example: Example) -> None:
        length = len(example.tokens)
        self.shortest = min(self.shortest or length, length)
        self.longest = max(self.longest, length)
        self.examples += 1
        self.tokens += length
        self.learnt += example.learnt

    def tell(self, key: str, config: NeoXConfig) -> None:
        """Print it, and what may be wrong. The seq_length and pack_impl are the configuration's."""
        empty = f", and {self.empty:,} empty" * (self.empty > 0)
        lengths = f"{self.shortest:,} to {self.longest:,}"
        log.info(
            f"{key}: {self.examples:,} example{'s' * (self.examples != 1)} in {self.files:,} "
            f"file{'s' * (self.files != 1)}{empty}: {self.tokens:,} tokens, {self.learnt:,} of "
            f"them learnt; {lengths} tokens each"
        )
        room = config.seq_length + 1
        given = self.examples + self.left_out + self.beyond + self.unlearnt
        if self.too_long:
            log.warning(f"{key}: {self._too_long(given, room)}")
        if self.unlearnt:
            log.warning(
                f"{key}: left out {self.unlearnt:,} of {given:,} examples, which have nothing to "
                "be learnt, such as a conversation without the assistant's turn"
            )
        if config.pack_impl == "unpacked" and self.examples:
            self._tell_padding(key, room)

    def _tell_padding(self, key: str, room: int) -> None:
        padding = 1 - self.tokens / (self.examples * room)
        several = "pack_impl: pack_until_overflow, which fills samples with several examples"
        if self.longest * 1.5 < room:  # a third is padding even in the longest row
            enough = -(-max(self.longest - 1, 8) // 8) * 8
            log.info(
                f"{key}: {padding:.0%} of the batches is padding, as the longest example has "
                f"{self.longest:,} of a sample's {room:,} tokens; seq_length: {enough} would do, "
                f"or {several}"
            )
        elif padding > 0.5:
            log.info(f"{key}: {padding:.0%} of the batches is padding; less with {several}")

    def _too_long(self, given: int, room: int) -> str:
        over = self.longest_given - room
        verb = "is" if self.too_long == 1 else "are"
        fates = [
            (self.cut_ends, "lost the end"),
            (self.cut_prompts, "lost the beginning of the prompt"),
            (self.beyond, "left out, as nothing that is learnt was left"),
            (self.left_out, "left out (allow_chopped: false)"),
        ]
        told = ", ".join(f"{count:,} {what}" for count, what in fates if count)
        lost = f", {self.cut_tokens:,} tokens in all" * (self.cut_tokens > 0)
        return (
            f"{self.too_long:,} of {given:,} examples {verb} longer than a sample, seq_length + 1 "
            f"= {room:,} tokens; the longest has {self.longest_given:,}, {over:,} too many: {told}"
            f"{lost}. A larger seq_length keeps more, and pack_impl: packed, which goes on in the "
            "next sample, everything"
        )
