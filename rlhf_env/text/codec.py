"""The one place where text becomes token ids and back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from rlhf_env.errors import ConfigError, EmptyPromptError, TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "\ue000\ue001\ue002"  # private-use characters: no template changes or trims them


class Codec:
    """Encodes prompts and decodes responses with any Hugging Face tokenizer, fast or slow.

    Text never becomes a special token: `<eos>` typed in a prompt stays five characters. `chat_template` is None or
    "none" (plain text), "auto" (the tokenizer's own template if it has one, else plain) or the text of a Jinja
    template; with a template a prompt is one user message, followed by the generation prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = cast("int | None", tokenizer.eos_token_id)
        self._special = _special_tokens(tokenizer)
        plain = chat_template in (None, "none") or (chat_template == "auto" and tokenizer.chat_template is None)
        own = None if plain else tokenizer.get_chat_template(None if chat_template == "auto" else chat_template)
        self._chat = None if own is None else _Chat(self, own)
        self._prefix = _prefix(tokenizer) if plain else []

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase | Codec) -> Codec:
        """The codec itself, or a plain-text one around a tokenizer."""
        return tokenizer if isinstance(tokenizer, Codec) else cls(tokenizer)

    @property
    def is_chat(self) -> bool:
        """Whether prompts are messages of a chat template, rather than the beginnings of plain text."""
        return self._chat is not None

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids, special and added tokens included (`len(tokenizer)` unless ids have gaps)."""
        return max(len(self.tokenizer), 1 + max(self.tokenizer.get_vocab().values()))

    @property
    def pad_token_id(self) -> int:
        """What fills padded places: the pad token, else EOS, else 0. Masks say what counts, never this id."""
        candidates = (cast("int | None", self.tokenizer.pad_token_id), self.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary: two tokenizers with different ones cannot share token ids."""
        vocab = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()

    def require_eos(self) -> int:
        """The id of the token that ends a response, or an error that says what to do without one."""
        if self.eos_token_id is None:
            raise TokenizerError(
                "the tokenizer has no EOS token, so no response could end by itself: set tokenizer.eos_token, or pass "
                "stop_at_eos=False to let every response run to the length limit"
            )
        return self.eos_token_id

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: one BOS if the tokenizer puts one before text (or what the chat template writes), no EOS."""
        ids = self._chat.encode(text) if self._chat else self._prefix + self.encode(text)
        if not ids:
            raise EmptyPromptError(
                f"the prompt {text!r} became no tokens: give it some text, or use a tokenizer that begins with BOS"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing added, and nothing in it read as a special token."""
        ids = self._ids(text, split_special_tokens=True)
        if forged := set(ids) & self._special.keys():
            names = ", ".join(repr(self._special[token]) for token in sorted(forged))
            raise TokenizerError(f"the tokenizer turns plain text into the special token {names}: {_excerpt(text)}")
        return ids

    def encode_response(self, prompt_ids: Sequence[int], prompt: str, response: str) -> list[int]:
        """Ids of a response text (without EOS) such that they follow the ids that `encode_prompt` gave its prompt.

        `decode_response(prompt_ids, ids) == response` wherever the tokenizer has such ids. Nothing in the text becomes
        a special token. The ids of a sampled response are kept, never made again from its text: they may be others.
        """
        candidates = self._candidates(prompt_ids, prompt, response)
        first = ids = next(candidates)
        while ids is not None and self.decode_response(prompt_ids, ids) != response:
            ids = next(candidates, None)
        return first if ids is None else ids

    def _candidates(self, prompt_ids: Sequence[int], prompt: str, response: str) -> Iterator[list[int]]:
        """Ids that may write `response` after the prompt, the most natural first."""
        if self._chat is None:
            whole = self._prefix + self.encode(prompt + response)
            if whole[: len(prompt_ids)] == list(prompt_ids):
                yield whole[len(prompt_ids) :]
        yield self._plain(response)
        # Llama and others begin every text with a space, which the middle of a text does not have.
        for anchor in ("\n", ".", "a"):
            try:
                before, whole = self._plain(anchor), self._plain(anchor + response)
            except TokenizerError:  # an alphabet without the anchor
                continue
            if whole[: len(before)] == before:
                yield whole[len(before) :]

    def _plain(self, text: str) -> list[int]:
        return self._chat._encode_run(text) if self._chat else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; bytes that are no complete character show as U+FFFD."""
        return self._text(ids, skip_special_tokens=True)

    def decode_response(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """The text that a response adds: decode(prompt) + this == decode(prompt + response).

        Decoding the response alone would lose its leading space where the decoder strips one (Llama, SentencePiece).
        """
        before = self.decode(prompt_ids)
        whole = self.decode([*prompt_ids, *response_ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(response_ids)

    def decode_responses(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
        """`decode_response` of each pair."""
        return [self.decode_response(*pair) for pair in zip(prompts, responses, strict=True)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text on display, special tokens by name; joined they are the whole text.

        A token that holds part of a character adds "", and the one that completes it adds the character.
        """
        shown, pieces = "", []
        for end in range(1, len(ids) + 1):
            pieces.append(self.next_piece(ids[:end], shown, last=end == len(ids)))
            shown += pieces[-1]
        return pieces

    def next_piece(self, ids: Sequence[int], shown: str, *, last: bool) -> str:
        """What the last of `ids` adds to the text `shown` of those before it; nothing, where a character is not whole.

        The `last` token of all shows what there is.
        """
        text = self._text(ids, skip_special_tokens=False)
        return "" if text.endswith("\ufffd") and not last else text[len(shown) :]

    def _text(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return cast(Any, self.tokenizer).decode(
            [int(token) for token in ids], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _ids(self, text: str, *, split_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"character {error.start} of the text is a lone surrogate, which is not valid Unicode: {_excerpt(text)}"
            ) from None
        try:
            return self.tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
            )
        except Exception as error:  # the Rust tokenizers raise bare Exception
            raise TokenizerError(f"the tokenizer cannot encode {_excerpt(text)}: {error}") from error


class _Chat:
    """A chat template around one user message, whose text cannot pose as the template's special tokens."""

    def __init__(self, codec: Codec, template: str) -> None:
        self._codec, self._template = codec, template
        self._around = self._render(_PLACEHOLDER).split(_PLACEHOLDER)
        if len(self._around) == 1:
            raise ConfigError(f"the chat template never writes the user's message: {template[:80]!r}")
        # Some templates write tokens that are added but not marked special; they steer the model all the same.
        written = {token for part in self._around for token in codec._ids(part, split_special_tokens=False)}
        added = {str(token) for i, token in codec.tokenizer.added_tokens_decoder.items() if i in written}
        special = set(codec._special.values())
        unmarked = {name for name in added - special if not name.isspace()}
        self._control, self._unmarked = _any_of(special | unmarked), _any_of(unmarked)

    def encode(self, text: str) -> list[int]:
        rendered = self._render(text)
        if self._control.findall(rendered) == self._control.findall("\0".join(self._around)):
            return self._codec._ids(rendered, split_special_tokens=False)
        # The text holds a control token: cut at the template's own ones and encode what lies between as plain text.
        message = next((m for m in (text, text.strip()) if m.join(self._around) == rendered), None)
        if message is None:
            raise TokenizerError(
                f"the prompt contains the text of a special token, and the chat template rewrites it so that the two "
                f"cannot be told apart: {_excerpt(text)}"
            )
        ids, run = [], ""
        for i, part in enumerate(self._around):
            run += message if i else ""
            for piece in self._control.split(part):
                if self._control.fullmatch(piece):
                    ids += [*self._encode_run(run), self._codec.tokenizer.convert_tokens_to_ids(piece)]
                    run = ""
                else:
                    run += piece
        return ids + self._encode_run(run)

    def _encode_run(self, text: str) -> list[int]:
        # `encode` leaves special tokens unread but not the unmarked ones; cut inside its name, none can be matched.
        cuts = [0, *(match.start() + 1 for match in self._unmarked.finditer(text)), len(text)]
        return [token for a, b in zip(cuts, cuts[1:], strict=False) for token in self._codec.encode(text[a:b])]

    def _render(self, text: str) -> str:
        try:
            message = [{"role": "user", "content": text}]
            return cast(Any, self._codec.tokenizer).apply_chat_template(
                message, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is a program and may raise anything
            raise ConfigError(f"the chat template fails on one user message: {error}") from error


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id → name of the tokens that no text may become: all special ones but an <unk> that is only that."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = {tokenizer.convert_tokens_to_ids(name): name for name in names.union(tokenizer.all_special_tokens)}
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        special.pop(tokenizer.unk_token_id, None)
    return special


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before any text, e.g. [BOS] (and without the EOS that some put after it)."""
    for probe in ("a", *tokenizer.get_vocab()):
        try:
            body = tokenizer.encode(probe, add_special_tokens=False, split_special_tokens=True)
            whole = tokenizer.encode(probe, split_special_tokens=True)
        except Exception:  # a vocabulary without this text
            continue
        if body:
            return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(body)] == body), [])
    raise TokenizerError("the tokenizer encodes none of its own tokens")


def _any_of(names: set[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
