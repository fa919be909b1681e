"""A Hugging Face causal language model with a value head, as a policy over next tokens."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PretrainedConfig

from rlhf_env import processes
from rlhf_env.errors import ConfigError, TokenizerError
from rlhf_env.functional import token_statistics
from rlhf_env.http import is_url
from rlhf_env.models.adapters import same_weights, without_adapters
from rlhf_env.models.blocks import Begun, Body
from rlhf_env.models.decoding import BlockDecoder, CachedDecoder, FullContextDecoder, keeps_only_keys_and_values
from rlhf_env.models.freezing import freeze_layers, layers_of
from rlhf_env.models.reading import action_log_probs, evaluate_states, response_log_probs
from rlhf_env.models.sharding import is_part, is_spread, spread
from rlhf_env.text.codec import Codec
from rlhf_env.types import Decoder, Rollout, SamplingLaw

VALUE_HEAD_FILE = "value_head.safetensors"


class CausalLM(nn.Module):
    """Any Hugging Face causal model plus a linear value head on its last hidden state.

    Dropout never turns on: a policy that samples without it and learns with it has a first ratio far from 1.
    The value head starts at zero, so before training every value is 0.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        config: PretrainedConfig = model.config  # type: ignore[assignment]
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        if (size := Codec.of(tokenizer).vocab_size) > embedding.weight.shape[0]:
            raise TokenizerError(
                f"the tokenizer has {size} tokens but the model's embedding only {embedding.weight.shape[0]} "
                "rows: this is not the model's own tokenizer, or tokens were added without resize_token_embeddings"
            )
        self.model = model
        self.tokenizer = tokenizer
        with torch.random.fork_rng(devices=[]):  # the head is zeroed below, so it costs nobody a random number
            self.value_head = nn.Linear(config.get_text_config().hidden_size, 1, device=embedding.weight.device)
        # Values are small numbers learned from noise: float32 even where the body is bfloat16.
        if embedding.weight.dtype == torch.float64:
            self.value_head.double()
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._checkpointed = False
        self._attention_only = keeps_only_keys_and_values(model)
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.eval()

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, device: str = "cpu", dtype: str = "float32", attention: str | None = None
    ) -> Self:
        """Load a Hugging Face folder or hub name, and the value head where the folder holds one.

        Weights are read from safetensors only, and no code from the folder is run. `attention` names the attention
        implementation ("eager" for algorithms that differentiate twice). Raises `ConfigError` where there is no such
        model, or where weights are missing from it.
        """
        name = os.fspath(name)
        if is_url(name):
            raise ConfigError(
                f"{name} is a server, which generate, prefer and evaluate can ask for responses; here the weights "
                "themselves are needed: give the folder or hub name of a model"
            )
        folder = Path(name)
        if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
            raise ConfigError(f"there is no folder {name}")
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ConfigError(f"{name} is not a Hugging Face model folder: it has no config.json")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=parse_dtype(dtype),
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
            )
            model, loading = loaded
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot load a causal language model from {name}: {str(error).splitlines()[0]}"
            ) from error
        if missing := sorted(loading["missing_keys"]):
            raise ConfigError(f"{name} lacks the weights {', '.join(missing[:5])}: they would be random")
        policy = cls(model.to(device), tokenizer)
        if (folder / VALUE_HEAD_FILE).is_file():
            policy.value_head.load_state_dict(load_file(folder / VALUE_HEAD_FILE, device=device))
        return policy

    @classmethod
    def from_config(
        cls, config: PretrainedConfig, tokenizer: Any, *, seed: int = 0, device: str = "cpu", dtype: str = "float32"
    ) -> Self:
        """A model of the given architecture with random weights that depend only on `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
        return cls(model.to(device=device, dtype=parse_dtype(dtype)), tokenizer)

    def save_pretrained(self, folder: str | os.PathLike[str], *, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a Hugging Face folder (safetensors, tokenizer) with the value head beside it.

        Adapters are merged into the weights that are written, so that any library can load them. Of weights that are
        spread over processes, `state` is `whole_state` of the model, for which all processes have to ask.
        """
        model: Any = without_adapters(self.model, merge=True) if self.has_adapters else self.model
        model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in self.value_head.state_dict().items()}, Path(folder) / VALUE_HEAD_FILE)

    def frozen_copy(self) -> Self:
        """The same model as a reference: its own weights, which no optimizer can change."""
        return copy.deepcopy(self).requires_grad_(False)

    def without_adapters(self) -> Self:
        """The model that `add_lora` began with, as a reference that shares this policy's weights.

        It costs no memory beside its own value head, and training the adapters does not change it. Move the policy to
        its device first. Raises `ConfigError` where there are no adapters.
        """
        plain = type(self)(without_adapters(self.model), self.tokenizer)
        plain.value_head.load_state_dict(self.value_head.state_dict())
        plain.value_head.requires_grad_(False)
        return plain

    @property
    def has_adapters(self) -> bool:
        """Whether `add_lora` was called on this policy."""
        return hasattr(self.model, "peft_config")

    def freeze_layers(self, k: int) -> Self:
        """Keep the embeddings and the first `k` blocks as they are."""
        freeze_layers(self.model, k)
        return self

    def checkpoint_gradients(self) -> Self:
        """Keep of each block its input only, and make the rest again in the backward pass: less memory for more time.

        Raises `ConfigError` for families that are not run block by block.
        """
        if self.body is None:
            raise ConfigError(f"{type(self.model).__name__} is not run block by block, so nothing can be made again")
        self._checkpointed = True
        return self

    def spread(self) -> Self:
        """Leave each of the `processes` that work together a part of the weights, of their gradients and Adam's state.

        Call it before an agent is made, and in all processes. Raises `ConfigError` where there is one process only, or
        a model that is not run block by block.
        """
        if processes.count() == 1:
            raise ConfigError("weights are spread over several processes, and this is one: start it with torchrun")
        if self.body is None or self._checkpointed or self.has_adapters:
            raise ConfigError(
                "only the weights of families that are run block by block can be spread, without gradient "
                "checkpointing and without adapters"
            )
        spread(self.model, layers_of(self.model), self.device)
        return self

    def train(self, mode: bool = True) -> Self:
        """Ignored: the model stays in evaluation mode, because dropout would make the policy two policies."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.value_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of log-probabilities: float64 for a float64 model, else float32."""
        return self.value_head.weight.dtype

    @property
    def context_length(self) -> int | None:
        """The most tokens that prompt and response may have together, where the model has a limit."""
        config = self.model.config.get_text_config()  # type: ignore[union-attr]
        return getattr(config, "max_position_embeddings", None)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        keep: int = 0,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Raw logits [B, K, V] and values [B, K] of the last K = `keep` columns (0: all).

        `attention_mask` [B, L] may have padding on either side. Positions count real tokens, because a model with
        absolute positions scores a left-padded row wrongly otherwise (5 nats per token on GPT-2).
        """
        logits, hidden = self.read(input_ids, attention_mask, keep=keep, cache=cache, position_ids=position_ids)
        return logits, self.value_head(hidden.to(self.dtype)).squeeze(-1)

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        keep: int = 0,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Raw logits [B, K, V] and last hidden states [B, K, H], which heads of one's own can read; as `forward`."""
        if cache is None and position_ids is None and (body := self.body) is not None:
            return self._flush_left(input_ids, attention_mask, keep, body)
        if cache is None and self._left_padding_leaks:
            return self._flush_left(input_ids, attention_mask, keep)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self._run(input_ids, attention_mask.long(), position_ids, keep, cache)

    def begin(self, rollout: Rollout) -> Begun | None:
        """What the frozen layers make of episodes, for `evaluate`; None where none is, or the family has no `body`.

        It takes B · L · D numbers, and holds while no weight changes that does not learn. Its rows are taken like the
        rollout's, `begun[rows]`.
        """
        return None if (body := self.body) is None else body.begin(rollout)

    def response_log_probs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Teacher-forced log-probabilities [B, T, V] under `rollout.law`, and values [B, T], before each token."""
        return response_log_probs(self, rollout)

    def evaluate(self, rollout: Rollout, begun: Begun | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, value and entropy at every response token, each [B, T], with gradient.

        `begun` is what `begin` gave for these very episodes, so that the frozen layers need not read them again.
        """
        if (body := self.body) is not None:
            return evaluate_states(self.heads, *body.states_before(rollout, begun), rollout)
        log_probs, values = self.response_log_probs(rollout)
        logp, entropy = token_statistics(log_probs, rollout.response_ids)
        return logp, values, entropy

    def decoder(
        self, num_rows: int, law: SamplingLaw, backend: Literal["auto", "blocks", "cached", "full"] = "auto"
    ) -> Decoder:
        """A decoder of `num_rows` rows that grow and restart independently.

        "blocks" runs the transformer of the families that `Body.of` knows, and raises `ConfigError` for others;
        "cached" is the model's own forward with its keys and values kept, and raises it where the model has something
        else to keep; "full" reads the whole context at every step; "auto" is the first that works.
        """
        if backend not in ("auto", "blocks", "cached", "full"):
            raise ConfigError(f"backend must be 'auto', 'blocks', 'cached' or 'full', got {backend!r}")
        if backend in ("auto", "blocks") and self.body is not None:
            return BlockDecoder(self, num_rows, law)
        if backend == "blocks":
            raise ConfigError(
                f"{type(self.model).__name__} is not among the families that are decoded block by block, or its "
                "attention is not 'sdpa', or it has hooks: decode it with backend='cached', as 'auto' does"
            )
        if backend == "cached" and not self._attention_only:
            raise ConfigError(
                f"{type(self.model).__name__} keeps something else than keys and values between tokens, so its rows "
                "cannot restart on their own: decode it with backend='full', which 'auto' does"
            )
        if backend == "cached" and self._padding_is_nan:
            raise ConfigError(
                "eager attention in float64 turns padding into NaN, which would stay in the cache: load the model with "
                "attention='sdpa', or decode with backend='full', as 'auto' does"
            )
        if backend == "full" or self._left_padding_leaks:
            return FullContextDecoder(self, num_rows, law)
        return CachedDecoder(self, num_rows, law)

    @torch.no_grad()
    def action_log_probs(
        self, observation: Mapping[str, NDArray[Any]], actions: NDArray[np.int64], law: SamplingLaw
    ) -> NDArray[np.floating]:
        """log π of `actions` [N] in the environment's observations (arrays [N, L]), as `bind_policy` wants them.

        Raises `ConfigError` where something between the environment and here has changed the observations.
        """
        rows = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return action_log_probs(self, observation, actions, law, rows)

    @property
    def body(self) -> Body | None:
        """The transformer, block by block, where its family is known; None: the model's own forward has to do."""
        return None if is_spread(self.model) else Body.of(self.model, checkpointed=self._checkpointed)

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits [..., V] and values [...] of last hidden states [..., D]."""
        return self._logits(hidden), self.value_head(hidden.to(self.dtype)).squeeze(-1)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)  # type: ignore[operator]

    @property
    def _left_padding_leaks(self) -> bool:
        """Whether padding before the first token would be seen: in a recurrent state, or as NaN."""
        return not self._attention_only or self._padding_is_nan

    @property
    def _padding_is_nan(self) -> bool:
        # Eager attention masks with the lowest float64, which is −∞ in the float32 that most families take the softmax
        # in: a column of padding, which may look at nothing, becomes NaN and reaches every later token.
        config: Any = self.model.config
        return self.dtype == torch.float64 and config._attn_implementation == "eager"

    def _flush_left(
        self, input_ids: Tensor, attention_mask: Tensor, keep: int, body: Body | None = None
    ) -> tuple[Tensor, Tensor]:
        """`read` with every row moved to the left, so that all padding comes after it, where no token looks."""
        length = input_ids.shape[1]
        column = torch.arange(length, device=input_ids.device)
        before = attention_mask.to(torch.uint8).argmax(1, keepdim=True)  # [B, 1] columns of padding on the left
        order = (column + before) % length
        place = (column[-keep:] - before) % length  # [B, keep]
        row = torch.arange(len(place), device=place.device).unsqueeze(1)
        if body is not None:
            width = max(1, int(attention_mask.sum(1).max()))  # all padding aside, the longest row fits the context
            hidden = body(input_ids.gather(1, order[:, :width]), lambda x: x[row, place.clamp(max=width - 1)])
            return self._logits(hidden), hidden
        positions = (attention_mask.gather(1, order).long().cumsum(-1) - 1).clamp(min=0)
        columns, place = place.unique(return_inverse=True)
        # What no token looks at may as well look at them: a column that may look at nothing is NaN.
        everything = torch.ones_like(order)
        logits, hidden = self._run(input_ids.gather(1, order), everything, positions, columns)
        return logits[row, place], hidden[row, place]

    def _run(
        self, ids: Tensor, mask: Tensor, positions: Tensor, columns: int | Tensor, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of the last `columns` (0: all), or of these column numbers."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
            return_dict=True,
            **({"logits_to_keep": columns} if self._keeps_last else {}),
        )
        kept = columns if isinstance(columns, Tensor) else slice(-columns, None)
        logits = output.logits if self._keeps_last else output.logits[:, kept]
        return logits, output.hidden_states[-1][:, kept]

    def __getstate__(self) -> dict[str, Any]:
        # At its first forward, Transformers hangs local functions into a model, which nothing can pickle. A model
        # without them gets them at its own first forward.
        if any(map(is_part, self.model.parameters())):
            raise ConfigError(
                "a policy whose weights are spread over processes cannot be copied, as a value network or a target "
                "network of an agent's own is"
            )
        model = same_weights(self.model)
        for module in model.modules():
            vars(module).pop("_output_capturing_hooks_installed", None)
            for number, hook in list(module._forward_hooks.items()):
                if hook.__module__ == "transformers.utils.output_capturing":
                    del module._forward_hooks[number]
        return {**vars(self), "_modules": {**self._modules, "model": model}}


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`: float32, float64, bfloat16 or float16."""
    dtypes = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ConfigError(f"dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]
