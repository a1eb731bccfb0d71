"""y_o = sum_i W_oi x_i + b_o"""


def element(args, options, where, index):
    x, (weight, bias) = args
    *lead, o = index
    total = 0.0 if bias is None else bias[o]
    for i in range(weight.shape[1]):
        total += weight[o, i] * x[(*lead, i)]
    return total
