"""One layer of the language model: `torch.nn.LSTM` with one bias, and the papers' dropout of its recurrent input."""

import torch
from torch import nn
from torch.nn import functional as F

from hf_tying.config import TyingError

from .state import LayerState, check_state


class LSTMLayer(nn.LSTM):
    """A layer of `torch.nn.LSTM`, batch first, whose second bias is a buffer of zeros.

    The cell of the papers has one bias for each gate. Torch's cell has two, which are counted twice, and whose sum
    learns at twice the rate.

    Args:
        input_size: width of the inputs.
        hidden_size: width of the outputs.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, batch_first=True)
        del self.bias_hh_l0
        self.register_buffer("bias_hh_l0", torch.zeros(4 * hidden_size), persistent=False)

    def forward(
        self,
        inputs: torch.Tensor,
        state: LayerState,
        recurrent_mask: torch.Tensor | None = None,
        weight_dropout: float = 0.0,
        attended: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LayerState]:
        """Run the layer over all steps.

        Args:
            inputs: (batch, time, input width).
            state: output and cell of the previous step, each (batch, width), without dropout.
            recurrent_mask: (batch, width), mask of the recurrent input at each step (variational dropout). Default:
                none.
            weight_dropout: share of the recurrent weights that is 0 in this pass, the same at each step (DropConnect).
            attended: (batch, time), boolean. Where it is false, the state does not change. Default: true everywhere.

        Returns:
            The outputs, (batch, time, width), and the state after the last step.

        Raises:
            TyingError: if the inputs or the state have a wrong shape. `torch.lstm` does not check this, and reads
                beyond their memory.
        """
        if inputs.ndim != 3 or inputs.shape[-1] != self.input_size:
            raise TyingError(
                f"The inputs of an LSTM layer (of the first: inputs_embeds) have the shape {tuple(inputs.shape)}: "
                f"expected (batch, time, {self.input_size})."
            )
        check_state((state,), len(inputs), [self.hidden_size])
        recurrent = F.dropout(self.weight_hh_l0, weight_dropout) if weight_dropout else self.weight_hh_l0
        if recurrent_mask is None and attended is None:
            weights = [self.weight_ih_l0, recurrent, self.bias_ih_l0, self.bias_hh_l0]
            state = tuple(part[None].contiguous() for part in state)
            outputs, output, cell = torch.lstm(inputs, state, weights, True, 1, 0.0, self.training, False, True)
            return outputs, (output[0], cell[0])

        gates = F.linear(inputs, self.weight_ih_l0, self.bias_ih_l0)
        output, cell = state
        outputs = []
        for step in range(inputs.shape[1]):
            masked = output if recurrent_mask is None else output * recurrent_mask
            i, f, g, o = torch.addmm(gates[:, step], masked, recurrent.t()).chunk(4, dim=1)
            new_cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            new_output = o.sigmoid() * new_cell.tanh()
            outputs.append(new_output)
            if attended is not None:
                here = attended[:, step, None]
                new_output, new_cell = torch.where(here, new_output, output), torch.where(here, new_cell, cell)
            output, cell = new_output, new_cell
        return torch.stack(outputs, dim=1), (output, cell)
