"""Squeeze-and-excitation: the official Caffe graphs, and a port without biases."""


def case(record):
    raise KeyError(record.name)
