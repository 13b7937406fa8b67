"""An architecture of one's own: a gated linear recurrence in place of attention, in one file."""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class GLAConfig(PretrainedConfig):
    model_type = "tiny_gla"

    def __init__(self, vocab_size=64, hidden_size=16, num_hidden_layers=2, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.gate, self.value = nn.LayerNorm(size), nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, hidden):
        x = self.norm(hidden)
        keep, value = torch.sigmoid(self.gate(x)), self.value(x)
        states, state = [], torch.zeros_like(value[:, 0])
        for t in range(x.shape[1]):
            state = keep[:, t] * state + (1 - keep[:, t]) * value[:, t]
            states.append(state)
        return hidden + torch.stack(states, 1)


class GLAModel(PreTrainedModel):
    config_class = GLAConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids, **kwargs):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(hidden)


class GLA(PreTrainedModel, GenerationMixin):
    config_class = GLAConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)

    def __init__(self, config):
        super().__init__(config)
        self.model = GLAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))
