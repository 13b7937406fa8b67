"""An architecture of one's own, a gated recurrence: oumi_pl fit --config mine.yaml --model.architecture gated.Gated."""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class GatedConfig(PretrainedConfig):
    model_type = "gated"

    def __init__(self, **kwargs):
        super().__init__(**({"vocab_size": 260, "hidden_size": 64} | kwargs))


class Recurrence(PreTrainedModel):  # transformers finds the embeddings and the head by the names that it uses itself
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.map = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, input_ids, **kwargs):  # causal, so padding on the right changes nothing
        keep, value, out = self.map(self.embed_tokens(input_ids)).chunk(3, -1)
        states = [torch.zeros_like(value[:, 0])]
        for gate, new in zip(keep.sigmoid().unbind(1), value.unbind(1), strict=True):
            states.append(gate * states[-1] + (1 - gate) * new)
        return BaseModelOutput(torch.stack(states[1:], 1) * out)


class Gated(PreTrainedModel, GenerationMixin):
    config_class, base_model_prefix = GatedConfig, "model"

    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = Recurrence(config), nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))
