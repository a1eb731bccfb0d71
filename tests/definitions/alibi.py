"""Press et al. 2022, the figure of section 3, for one head, query and key."""


def element(args, options, where, index):
    (slopes,) = args
    h, i, j = index
    position = i + options["offset"]
    if options["form"] == "key_position":
        return slopes[h] * j
    if options["form"] == "distance" and j > position:
        return slopes[h] * (position - j)
    return slopes[h] * (j - position)
