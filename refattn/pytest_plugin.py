"""A fixture for pytest: does a function conform to a mechanism?

    def test_mine(conforms):
        conforms(my_attention, like="dot_product_attention", arithmetic="bf16_flash")

It takes what refattn.check takes and returns the Report. A test that fails shows the report, not our traceback.
`--refattn-seed` and `--refattn-examples` say which calls are drawn and how many, where the test itself does not.
It is installed with refattn; NumPy and the rest are imported when a test asks for the fixture, not before.
"""

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("refattn")
    group.addoption("--refattn-seed", type=int, default=None, metavar="N", help="which calls are drawn")
    group.addoption("--refattn-examples", type=int, default=None, metavar="N", help="how many calls are tried")


@pytest.fixture
def conforms(request):
    """conforms(candidate, like, **options): refattn.check, and a failure with the whole report if anything differs."""
    options = {"seed": request.config.getoption("refattn_seed")}
    options |= {"max_examples": request.config.getoption("refattn_examples")}
    given = {name: value for name, value in options.items() if value is not None}

    def conforms(candidate, like, **options):
        __tracebackhide__ = True
        from refattn.oracle.check import check

        report = check(candidate, like, **given | options)
        if not report.ok:
            pytest.fail(str(report), pytrace=False)
        return report

    return conforms
