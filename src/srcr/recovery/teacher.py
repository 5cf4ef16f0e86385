"""The original model as the teacher: its last hidden states are kept, its logits made of them when needed."""

from dataclasses import dataclass, field
from typing import Any

import torch

from srcr.data.tokens import Batch
from srcr.engine.activations import HiddenStates
from srcr.metrics.predictions import Predictions, predict, with_states


@dataclass(eq=False)
class Teacher:
    """The original ``model`` on its device. ``in_pieces``: whether its logits can be made of hidden states
    (:func:`srcr.metrics.predictions.has_pieces`); then those of each row that it has seen are kept in
    ``states``, width numbers a token instead of a vocabulary, and the model's body runs once for a row."""

    model: Any
    in_pieces: bool
    states: HiddenStates
    _places: dict[tuple[str, int], int] = field(default_factory=dict)
    _output: Any = None

    @torch.no_grad()
    def predict(self, text: str, batch: Batch) -> Predictions:
        """The predictions for a batch of rows of the text whose hash is ``text``."""
        ids = batch.input_ids.to(self.model.device)
        keys = [(text, row) for row in batch.rows.tolist()]
        if not self.in_pieces:
            return predict(self.model, ids, in_pieces=False)
        missing = [i for i, key in enumerate(keys) if key not in self._places]
        if missing:
            output = predict(self.model, ids[missing]).output
            self._output = self._output or without_states(output)
            for i, states in zip(missing, output.last_hidden_state, strict=True):
                self._places[keys[i]] = len(self.states)
                self.states.append(states)
        states = [self.states[self._places[key]] for key in keys]
        return Predictions(self.model, ids, with_states(self._output, torch.stack(states)))


def without_states(output: Any) -> Any:
    """A model's output whose hidden states are left out: what else its head may look at."""
    return with_states(output, output.last_hidden_state[:0])
