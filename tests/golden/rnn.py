"""torch.nn's recurrent layers."""

from refattn.primitives import gru_cell, lstm_cell, recurrent, rnn_cell
from tests.golden import Case

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def case(record):
    kind, ctor = record.meta["cls"], record.ctor
    both = ctor.get("bidirectional", False)
    ends = [f"l{layer}{way}" for layer in range(ctor.get("num_layers", 1)) for way in ("", "_reverse")[: 1 + both]]

    def args(get):
        cells = tuple(cell_params(get, kind, f"_{end}") for end in ends)
        return get("in.x"), _state(get, "in", "h0", "c0"), recurrent.Params(cells)

    def out(get):
        return recurrent.Out(get("out.y"), _state(get, "out", "hn", "cn"))

    def _state(get, where, h, c):
        names = (h, c) if kind == "LSTM" else (h,)
        return recurrent.State(*(get(f"{where}.{name}").swapaxes(0, 1) for name in names))

    return Case(recurrent, args, out, {"direction": "both" if both else "forward"})


def cell_params(get, kind, suffix="", prefix=""):
    """torch stacks the gates of a cell along the rows of its weights, in the order refattn has them."""
    module, gates = {"RNN": rnn_cell, "GRU": gru_cell, "LSTM": lstm_cell}[kind], GATES[kind]

    def stacked(name, **optional):
        rows = get(f"param.{prefix}{name}{suffix}", **optional)
        return rows if gates == 1 or rows is None else rows.reshape(gates, -1, *rows.shape[1:])

    biases = (stacked(name, optional=True) for name in ("bias_ih", "bias_hh"))
    return module.Params(stacked("weight_ih"), stacked("weight_hh"), *biases)
