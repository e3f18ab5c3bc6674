"""One HTML file that shows a compressed network to a person: no script, no network access."""

from legocompress.report.html.gallery import is_original
from legocompress.report.html.page import MAX_PAGE_BYTES, ReportSources, write_html_report
from legocompress.report.html.photos import MAX_PHOTOS

__all__ = ["MAX_PAGE_BYTES", "MAX_PHOTOS", "ReportSources", "is_original", "write_html_report"]
