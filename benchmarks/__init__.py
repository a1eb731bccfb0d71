"""How long refattn takes, beside other people's code: python -m benchmarks.vision."""
