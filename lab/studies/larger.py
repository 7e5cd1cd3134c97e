"""The demo's models, twice as wide."""

from lab.studies.report import Section
from lab.studies.scale import compare
from lab.studies.workbench import Workbench


def study(bench: Workbench) -> Section:
    return compare(bench, [bench.wide], "larger.png")
