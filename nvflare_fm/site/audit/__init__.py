"""What an adapter tells of a site's rows, measured where the rows are: only a report without any row is written."""
