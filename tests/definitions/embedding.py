"""y_sd = E_ids_s,d"""


def element(args, options, where, index):
    (table,) = args
    *s, d = index
    return table[int(options["ids"][(*s,)]), d]
