"""Results of a folder as a report: tables, figures and statements."""
