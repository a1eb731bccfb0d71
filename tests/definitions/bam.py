"""Park, Woo, Lee and Kweon 2018, equations 1 and 2, or the product of the authors' code; see the two branches."""

import math

from tests.definitions import bam_channel, bam_spatial


def element(args, options, where, index):
    x, params = args
    n, c, i, j = index
    channel, spatial = (None, None) if options.get("stats") is None else options["stats"]
    what = bam_channel.logits(x, params.channel, options["pool"], channel)[n][c]
    where = bam_spatial.logits(x, params.spatial, options["dilation"], spatial)[n, 0, i, j]
    both = what * where if options["combine"] == "mul" else what + where
    return x[index] * (1 + 1 / (1 + math.exp(-both)))
