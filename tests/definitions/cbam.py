"""Woo, Park, Lee and Kweon 2018, equation 1: the definition of the spatial gate, of that of the channel gate."""

import numpy as np

from tests.definitions import cbam_channel, cbam_spatial


def element(args, options, where, index):
    x, params = args
    if params.spatial is None:
        return cbam_channel.element((x, params.channel), options, "", index)
    scaled = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        scaled[at] = cbam_channel.element((x, params.channel), options, "", at)
    return cbam_spatial.element((scaled, params.spatial), options, "", index)
