"""The figures of a report: for the page as SVG that follows its colours, and as files for a paper."""
