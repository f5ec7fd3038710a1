"""Reports that derive from a result: tables, CSV, plots, one page of HTML."""
