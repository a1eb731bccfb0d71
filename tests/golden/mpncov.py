"""The two Functions of MPNCOV: covariance pooling, and the root by Newton-Schulz."""

from refattn.primitives import covariance_pool, matrix_sqrt
from tests.golden import Case


def case(record):
    if "iterN" in record.meta:
        options = {"iterations": record.meta["iterN"]}
        return Case(matrix_sqrt, lambda get: (get("in.a"),), lambda get: get("out.y"), options)
    return Case(covariance_pool, lambda get: (get("in.x"),), lambda get: get("out.y"))
