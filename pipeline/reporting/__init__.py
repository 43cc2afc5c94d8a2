"""What a person reads of evaluations: report.html, report.md and charts; and the pages of `revq compare`."""
