"""Pages: index.html, table.csv and table.md of a run or a sweep, from what lies in the runs' directories."""
