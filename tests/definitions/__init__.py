"""One output element of each mechanism, from the paper's index equation: plain Python scalars, or mpmath.

A file here is named after the mechanism it restates and shares no line, no helper and no NumPy operation with it.
`element(args, options, where, index)` returns the entry `index` of the output leaf `where` ("" if there is one
output only). `args` and `options` are those of `forward`; read single entries of the arrays, nothing more.
"""
