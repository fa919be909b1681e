"""Who is asked which response is better, and who writes in words, one sentence per setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_env.errors import ConfigError
from rlhf_env.http import is_url
from rlhf_env.settings import HTTPConfig, LabelerConfig, require


@dataclass(frozen=True)
class WriterConfig:
    """A language model that is asked in words: a local one, or a chat model behind a server."""

    model: str | None = None  #: folder or hub name of the model, or a server's http://HOST:PORT/v1
    served_name: str | None = None  #: where it is a URL: the name under which the server knows the model
    max_new_tokens: int = 256  #: the longest reply, in tokens
    temperature: float = 0.0  #: of its replies; 0: the likeliest token each time
    chat_template: str = "auto"  #: of a local model: "auto" (the tokenizer's own, if any), "none" or a Jinja file
    at_once: int = 32  #: replies written, or requests under way, side by side
    http: HTTPConfig = field(default_factory=HTTPConfig)  #: how patiently a server is asked

    def __post_init__(self) -> None:
        require(self, max_new_tokens=(1, None), at_once=(1, None), temperature=(0, None))
        if is_url(self.model or "") and self.served_name is None:
            raise ConfigError(f"{self.model} is a server: say served_name, the name under which it knows the model")
        if self.served_name is not None and not is_url(self.model or ""):
            raise ConfigError(f"served_name is of a model that is a URL; {self.model} is none")


@dataclass(frozen=True)
class JudgeConfig(WriterConfig):
    """A language model that labels: it is asked which of two responses is better, for each pair of a query."""

    model: str | None = None  #: folder or hub name, or a server's http://HOST:PORT/v1; none: labelers are simulated
    by: Literal["verdict", "log_odds"] = "verdict"  #: what is read: the reply, or the probabilities of its first word
    words: tuple[str, str] | None = None  #: with log_odds, those two words; none: "A" and "B", after a space in a text
    template: str | None = None  #: file with {fence}, {prompt}, {first}, {second}, {principle}; none: the built-in one
    principles: str | None = None  #: file of principles, .txt (one per line) or .yaml; each query is judged by one
    swap: bool = True  #: ask in both orders, so that no place is an advantage
    tie_policy: Literal["tie", "skip"] = "tie"  #: what no clear win is, verdicts that differ in the two orders included

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and (self.by != "verdict" or self.template or self.principles):
            raise ConfigError("a judge needs a model: judge.model, a folder, a hub name or a server's URL")
        if self.by == "log_odds" and is_url(self.model or ""):
            raise ConfigError(f"log_odds needs a local model's probabilities; {self.model} is asked for verdicts only")
        if self.words is not None and self.by != "log_odds":
            raise ConfigError("words are of a judge by log_odds; a verdict is [[A]], [[B]] or [[C]]")


@dataclass(frozen=True)
class MemberConfig:
    """One of the labelers who share the queries: a simulated one, or a judge."""

    weight: float = 1.0  #: how often it is asked, relative to the others
    gold: str | None = None  #: its true reward; none: that of the command
    biases: dict[str, float] = field(default_factory=dict)  #: what else it likes, as `biases` of the command
    labeler: LabelerConfig = field(default_factory=LabelerConfig)  #: how it errs
    judge: JudgeConfig = field(default_factory=JudgeConfig)  #: the language model that judges in its place

    def __post_init__(self) -> None:
        if self.judge.model and (self.gold or self.biases or self.labeler != LabelerConfig()):
            raise ConfigError(
                f"{self.judge.model} judges by its question, not by gold, biases and errors of a simulated labeler: "
                "leave these out"
            )
