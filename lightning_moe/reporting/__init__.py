"""Tables, figures and one page that say what a run did."""

from lightning_moe.reporting.report import write_report
from lightning_moe.reporting.summary import Export, Result, Summary
from lightning_moe.reporting.table import Column, format_markdown, format_table, summary_table
from lightning_moe.reporting.words import headlines, plan_in_words

__all__ = [
    "Column",
    "Export",
    "Result",
    "Summary",
    "format_markdown",
    "format_table",
    "headlines",
    "plan_in_words",
    "summary_table",
    "write_report",
]
